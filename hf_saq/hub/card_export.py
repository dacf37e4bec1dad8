"""Say in a model card which integer graph lies beside the model, what was verified of it, and how to run it."""

from __future__ import annotations

from ..export.report import ExportReport
from ..export.targets import TARGETS
from ..installing import how_to_install
from ..tables import kibibytes


def integer_inference(
    export: ExportReport | None, load_from: str | None, revision: str | None, has_processor: bool
) -> str:
    """Write the section about an export; empty if there is none.

    Args:
        export: What was written, and found out about it.
        load_from: A repository or a directory, as in [`CardFacts`].
        revision: Branch of the repository, if not the main one.
        has_processor: Whether an image processor lies beside it, which pipelines need.
    """
    if export is None:
        return ""
    parts = [
        "## Integer inference",
        f"`{export.file}` ({kibibytes(export.size)}, {export.weights} weights) holds the learned scales and the "
        f"integer codes of this model as a graph of ONNX, for {_plain(TARGETS[export.target])}.",
    ]
    if export.checks:
        checks = [f"- {name}: {found}" for name, found in export.checks.items()]
        parts.append("\n".join(["Verified when it was written:", "", *checks]))
    if load_from is not None and has_processor:
        parts.append("With ONNX Runtime, or with OpenVINO:\n\n" + _python(load_from, revision))
        parts.append("In a browser, or under node:\n\n" + _javascript(load_from, revision))
    return "\n\n".join(parts)


def _python(load_from: str, revision: str | None) -> str:
    of_branch = f', revision="{revision}"' if revision is not None and is_repository(load_from) else ""
    lines = [
        f"# {how_to_install('onnx')}",
        "from transformers import AutoImageProcessor, pipeline",
        "from hf_saq.export import ExportedClassifier",
        "",
        f'model = ExportedClassifier.from_pretrained("{load_from}", engine="onnxruntime"{of_branch})  # or "openvino"',
        f'processor = AutoImageProcessor.from_pretrained("{load_from}"{of_branch})',
        'classify = pipeline("image-classification", model=model, image_processor=processor)',
        'print(classify("image.png"))',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _javascript(load_from: str, revision: str | None) -> str:
    of_branch = f', revision: "{revision}"' if revision is not None else ""
    lines = [
        'import { pipeline } from "@huggingface/transformers";',
        "",
        f'const classify = await pipeline("image-classification", "{load_from}", {{ dtype: "q8"{of_branch} }});',
        'console.log(await classify("image.png"));',
    ]
    return "```js\n" + "\n".join(lines) + "\n```"


def is_repository(load_from: str) -> bool:
    """Tell the name of a repository from that of a directory: only the first names its owner."""
    return "/" in load_from


def _plain(meaning: str) -> str:
    return meaning.replace(": ", " (", 1) + ")" if ": " in meaning else meaning
