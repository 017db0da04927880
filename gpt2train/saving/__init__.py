"""Checkpoints on their way to where they are kept.

saver       beside the training, one at a time, in a thread
"""
