"""`python -m vecinfer_jax` is the `vecinfer` command."""

from vecinfer_jax.cli import entry

if __name__ == "__main__":
    entry()
