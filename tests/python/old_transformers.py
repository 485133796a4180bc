"""What a converted folder does in transformers 4.57, run as a program with that version first on the path.

    python old_transformers.py FOLDER...

Every folder holds a converted checkpoint and `expected.npz` with `ids`, our `logits` [seq_len, vocab_size] and our greedy
`new` ids. Ends with an assertion where something differs.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

TOLERANCE = 5e-5  # as in test_parity_families.py


def assert_close(model, expected):
    ids = torch.from_numpy(expected["ids"])[None]
    with torch.no_grad():
        logits = model.eval()(ids).logits[0].numpy()
    wanted = expected["logits"]
    off = np.abs(logits - wanted).max() / np.sqrt(np.mean(wanted**2))
    assert off <= TOLERANCE, (model.config.model_type, off)


def check(folder: Path) -> None:
    expected = np.load(folder / "expected.npz")
    differ = "per_layer_config" in json.loads((folder / "config.json").read_text())
    if differ:
        refusal = ""
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except RuntimeError as error:
            refusal = str(error)
        assert "size mismatch" in refusal or "mismatched" in refusal, refusal or "loaded without trust_remote_code"
    # its sdpa leaves soft-capping out
    soft_capped = json.loads((folder / "config.json").read_text()).get("attn_logit_softcapping")
    for attention in ("eager",) if soft_capped else ("sdpa", "eager"):
        options = {"trust_remote_code": differ, "dtype": torch.float32, "attn_implementation": attention}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert_close(model, expected)
        prompt = torch.from_numpy(expected["ids"])[None]
        for cache in ({}, {"cache_implementation": "static"}):
            new = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=len(expected["new"]),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **cache,
            )
            assert new[0, prompt.shape[1] :].tolist() == expected["new"].tolist()
    model.save_pretrained(folder / "again")
    assert_close(AutoModelForCausalLM.from_pretrained(folder / "again", **options), expected)


if __name__ == "__main__":
    assert transformers.__version__.startswith("4.57"), transformers.__version__
    for name in sys.argv[1:]:
        check(Path(name))
    print("passed", len(sys.argv) - 1)
