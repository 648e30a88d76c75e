"""`python -m tiltlm`."""

from tiltlm.cli.main import run

if __name__ == "__main__":
    run()
