"""`python -m llmrl` is the command `llmrl`."""

from llmrl.cli import main

main()
