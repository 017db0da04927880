"""Checkpoints on their way to where they are kept.

saver   beside the training, one at a time, in a thread
remote  to other storage, and back on an empty machine
    bucket  one place in other storage: data_pipeline's, with training's errors
"""
