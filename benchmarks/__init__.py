"""Benchmarks: a room for each question, whose name is that of its results and of its make target.

- `step_cost`: what does a training step cost, against float and against plain quantization-aware training?
- `accuracy`: does sharpness-aware quantization beat plain quantization-aware training? Its `engines` ask whether
  exports predict the same on other engines.
- `schedules`: what do cheaper schedules keep of the gain, and what do they cost?
- `ways`: which further ways to pay less, or to gain more, deserve a place in the package?
- `quantizers`: what do quantizers keep of the float model's accuracy at 4, 3 and 2 bits?
- `gpu_campaign`: what does one GPU say: tests, costs of steps, a few minutes of training?
- `float_function`: what do conversion and training keep of the float model's function?
- `deploy`: what do the forms of a quantized model cost in time, memory and size?
- `packed_size`: what does a packed file take on disk, in memory and to load?
- `sensitivity_cost`: what does it cost to find the sensitive layers of a model, in evaluation passes?
- `shared`: parts that several rooms use.

Scripts run from the root of the repository: `python -m benchmarks.<room>.<script>`. In a room, `sweep` or `measure`
makes results and `page` writes a page of docs/ from them. A run that is stored in `benchmarks/results` is not run
again, so an interrupted script goes on where it stopped.

Must not know: tests. Nothing in `hf_saq` knows benchmarks.
"""

import sys
from pathlib import Path

# Let modules of the example scripts import each other, as where a script runs: some benchmarks take parts of them.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
