from dsa_export.cli import run
from engines.build import main

if __name__ == "__main__":
    run(main)
