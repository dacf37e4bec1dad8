"""Parts that several rooms use: data and models, training, stored runs, statistics, and how pages are written.

Data and models: `images`, `stored_tensors`, `cifar_data`, `cifar_resnet`, `digits_training`, `places`.
Training: `training_loop`, `cifar_training`, `schedule_variants`.
Results and pages: `runs`, `paired`, `command_line`, `markdown`, `plots`.

Comes in: what a room asks for. Goes out: values; only `runs` and `stored_tensors` write files that others read again.
Must not know: any room.
"""
