"""A BERT pruned to 80% in ``Trainer.train()``, saved, and reloaded by plain ``from_pretrained`` elsewhere.

    OMP_NUM_THREADS=1 python benchmarks/sparse_bert.py [--steps 300] [--hidden 128] [--out FOLDER]

A masked language model with a decoder tied to its embeddings learns made-up sentences, in which each word follows from
the one before it. It is trained dense, and pruned on the cubic schedule while it trains; then the sparse one is tuned
further under its masks, from the saved folder alone. "Elsewhere" is a process that cannot import this package.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent.parent))

from prune import Masks
from prune.hf import GradualPruning, KeepMasked, masks_of_zeros

VOCABULARY, LENGTH, MASK = 61, 16, 1

ELSEWHERE = """
import json, sys, torch
for name in ("prune", "distill", "workbench"):
    sys.modules[name] = None
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1]).eval()
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(input_ids=inputs).logits, sys.argv[3])
zeros = {name: int((value == 0).sum()) for name, value in model.named_parameters()}
tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
print(json.dumps({"zeros": zeros, "tied": tied, "keys": list(model.state_dict())}))
"""


def network(hidden: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 4, "num_hidden_layers": 2}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))


def sentences(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2, VOCABULARY, (count, 1), generator=generator)
    while words.shape[1] < LENGTH:
        following = 2 + (3 * words[:, -1] + 1) % (VOCABULARY - 2)
        words = torch.cat([words, following[:, None]], 1)
    hidden = torch.rand(words.shape, generator=generator) < 0.15
    hidden[:, LENGTH // 2] = True
    inputs, labels = words.masked_fill(hidden, MASK), words.masked_fill(~hidden, -100)
    return [{"input_ids": i, "labels": label} for i, label in zip(inputs, labels, strict=True)]


def train(model: Any, folder: Path, steps: int, *callbacks: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.01,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    rows = sentences(2048, 1), sentences(256, 2)
    trainer = Trainer(model, args, train_dataset=rows[0], eval_dataset=rows[1], callbacks=list(callbacks))
    trainer.train()
    return trainer


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def elsewhere(folder: Path, inputs: Tensor) -> tuple[dict[str, Any], Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "inputs.pt", Path(scratch) / "logits.pt"
        torch.save(inputs, given)
        command = [sys.executable, "-c", ELSEWHERE, str(folder), str(given), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=scratch)
        return json.loads(done.stdout.splitlines()[-1]), torch.load(found, weights_only=True)


def measure(out: Path, steps: int, hidden: int) -> None:
    dense = train(network(hidden), out, steps)
    model = network(hidden)
    every = f"{max(1, steps // 20)}it"
    pruning = GradualPruning(0.2, f"{steps // 10}it", f"{steps * 7 // 10}it", every)
    sparse = train(model, out, steps, pruning)
    dense.save_model(str(out / "dense"))
    sparse.save_model(str(out / "sparse"))
    masks = pruning.masks
    assert isinstance(masks, Masks)
    masks.save(out / "masks.safetensors")
    inputs = torch.stack([row["input_ids"] for row in sentences(64, 3)])
    with torch.no_grad():
        logits = model.eval()(input_ids=inputs).logits
    found, reloaded = elsewhere(out / "sparse", inputs)
    kept = sum(total - found["zeros"][name] for name, (_, total) in masks.counts().items())
    embedding = "bert.embeddings.word_embeddings.weight"
    total = sum(parameter.numel() for parameter in model.parameters())
    dense_keys = list(network(hidden).state_dict())
    print(f"BERT of {total / 1e6:.2f}M parameters, {steps} updates of 32 x {LENGTH} tokens, torch {torch.__version__}")
    print(
        f"density in training      {masks.density:.6f} of {sum(m.numel() for m in masks.values()):,} prunable weights"
    )
    print(f"density reloaded         {kept / sum(mask.numel() for mask in masks.values()):.6f}")
    print(f"of all parameters        {masks.model_density(model):.4f}")
    print(f"largest logit difference {(reloaded - logits).abs().max():.1e} of {logits.abs().max():.2f}")
    print(f"new keys in the state    {len(set(found['keys']) ^ set(dense_keys))}")
    print(f"embeddings               {found['zeros'][embedding]} zeros; tied after reload: {found['tied']}")
    print(f"eval loss                dense {loss(dense):.3f}, sparse {loss(sparse):.3f}")
    print(f"model files, MB          dense {size(out / 'dense'):.2f}, sparse {size(out / 'sparse'):.2f}")
    print(f"masks file, MB           {(out / 'masks.safetensors').stat().st_size / 1e6:.3f}")
    again = AutoModelForMaskedLM.from_pretrained(out / "sparse")
    print(f"masks of its zeros       {'the same' if masks_of_zeros(again) == masks else 'others'}")
    tuned = train(again, out, max(1, steps // 4), KeepMasked(out / "masks.safetensors"))
    obeyed = masks.is_applied_to(again)
    print(f"tuned under its masks    eval loss {loss(tuned):.3f}, masks obeyed: {obeyed}")
    free = AutoModelForMaskedLM.from_pretrained(out / "sparse")
    train(free, out, max(1, steps // 4))
    left = sum(int(free.get_parameter(name).count_nonzero()) for name in masks)
    print(f"tuned without            density {left / sum(mask.numel() for mask in masks.values()):.4f}")


def loss(trainer: Trainer) -> float:
    return trainer.evaluate()["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--out", type=Path, help="where to keep the models; a temporary folder by default")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measure(arguments.out or Path(scratch), arguments.steps, arguments.hidden)


if __name__ == "__main__":
    main()
