"""Images and pretrained models that several tasks of the accuracy benchmark start from."""
