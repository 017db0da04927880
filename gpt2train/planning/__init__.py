"""What a run will take before it starts, and what a size will give before it is trained.

The rooms:

    config    the settings of a cluster, a plan and a sweep
    memory    bytes on one GPU at the worst moment of a step, by component
    forecast  tokens a second, days, cost, energy, disk
    choose    every ZeRO stage and activation policy on a cluster; the fastest that fits; what does not fit is refused
    table     the plan as a table
    outcome   the forecast of a run beside what it measured
    runs      run folders → their numbers
    law       L(N, D) and learning-rate rules, with intervals and what they missed
    pictures  loss over size, tokens and FLOPs; isoFLOP curves
    trials    values of settings → the trials of a sweep
    sweep     the trials of a sweep → scaling.json, sweep.html, a table
"""
