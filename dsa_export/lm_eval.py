"""python -m dsa_export.lm_eval …: EleutherAI's lm-eval with the models of this package known to transformers.

    pip install -e '.[eval]'
    python -m dsa_export.lm_eval run --model hf --model_args pretrained=ckpt --tasks lambada_openai

All arguments are lm-eval's own. What makes it work is the import of dsa_export.model, which registers the model.
"""

from __future__ import annotations

import dsa_export.model  # noqa: F401
from dsa_export.cli import UserError, run


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError(f"lm-eval cannot be imported ({error}): pip install -e '.[eval]'") from None
    cli_evaluate()


if __name__ == "__main__":
    run(main)
