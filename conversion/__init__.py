"""Checkpoints of other packages -> folders of ours, and back.

`convert.py` tells the story in both directions. Below it, each importing only what stands further down:

    command_line                          the options that users type
    convert                               there and back, one stage a line
    compare, card                         source and result on the same inputs; the README.md of a result
    source, tokenizer, image_processor    what a user names, and the files that travel with the weights
    download                              from OpenAI and from the Hub
    layouts/                              one module or folder for each layout: its names, its config, its own code
    reading/, writer                      untrusted files in, whole files out
    openai_files, processor_files         names and numbers that others publish
    memory, progress, messages            one tensor at a time; bars; parts of error messages
"""
