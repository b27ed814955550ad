"""`python -m llm2clip` is the command `llm2clip`."""

from llm2clip.cli import main

if __name__ == "__main__":
    main()
