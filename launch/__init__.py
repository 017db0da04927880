"""Starts training; imports neither gpt2train nor data_pipeline and hands on command lines.

    config   how many processes, where
    local    all ranks on this machine: torchrun or the deepspeed launcher
    run      chooses the launcher; dry run; exit codes
    sweep    one command after another, resumable by trial
"""
