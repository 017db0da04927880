"""What the command line offers.

The rooms:

    table           each command: what it is for, its settings, the function that runs it
    settings_files  `@FILE`: settings that stand in a file
    help            --help and tab completion
    joined          launch, sweep and report: commands that join packages
    planned         plan, and what launch makes of one
"""
