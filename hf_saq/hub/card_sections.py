"""Write the sections of a model card that are the same for many models: classes, limitations, citation."""

from __future__ import annotations

from .card_facts import CardFacts

LISTED = 20
"""Number of classes that are named in plain sight; more are folded."""

CITATION = """## Citation

```bibtex
@article{liu2021sharpnessaware,
  title={Sharpness-aware Quantization for Deep Neural Networks},
  author={Liu, Jing and Cai, Jianfei and Zhuang, Bohan},
  journal={arXiv preprint arXiv:2111.12273},
  year={2021}
}
```"""


def closing_sections(facts: CardFacts) -> tuple[str, ...]:
    """Write what follows the training in the card of a quantized model."""
    return (_classes(facts), _limitations(facts), CITATION)


def folded(title: str, text: str) -> str:
    """Put `text` behind a line that opens on a click."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def _classes(facts: CardFacts) -> str:
    if not facts.labels:
        return ""
    names = ", ".join(" ".join(label.split()) for label in facts.labels)
    if len(facts.labels) > LISTED:
        names = folded(f"{len(facts.labels)} classes", names)
    return f"## Classes\n\n{names}"


def _limitations(facts: CardFacts) -> str:
    lines = []
    if facts.metrics:
        lines.append("The results hold for the data that they were measured on. No other data were tried.")
    else:
        lines.append("How good this model is was not measured, or not stored with it.")
    config = facts.config
    if config is not None and config.activation_bits is not None:
        lines.append(
            "Ranges of activations were fitted to the training images: inputs unlike those are cut off at their ends."
        )
    lines.append(
        "In PyTorch it computes in floating point on quantized values, so it is small but no faster than the float "
        "model; `hf-saq export` writes an integer graph for engines that are."
    )
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)
