"""A model → text, one way or another.

The rooms, in the order a prompt meets them:

    config     settings of `generate` and `serve`, and their bounds
    sampling   logits → the next token
    watermark  a keyed preference for some tokens, and the test that finds it again
    products   a token's matrix products on a CPU, and where the weights lie for them
    decoding   prompts → tokens, many rows at once, with keys and values kept
    drafting   what a text might go on with, guessed from the text itself
    text       tokens → whole characters as they come, up to a stop string
    embedding  texts → hidden states by layer
    generate   the command: samples on standard output, or as JSON lines
    completion a request for completions → settings, and its answer, in OpenAI's form
    serve      a local page with live text, and the completions endpoint
"""
