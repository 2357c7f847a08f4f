"""How good a trained model is: on the images it held out, or on others; in text and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cv_classification.config import InputError, check_output
from cv_classification.data import Sample, read_labelled
from cv_classification.device import make_context
from cv_classification.images import check_images, read_split
from cv_classification.metrics import report
from cv_classification.model import Trained, load_trained
from cv_classification.tracking import Row, read_history
from cv_classification.tta import predict_samples


def evaluate(
    checkpoint: Path,
    overrides: Sequence[str] = (),
    *,
    data: Path | None = None,
    images: Path | None = None,
    tta: bool = False,
    mc_dropout: int = 0,
    skip_bad: bool = False,
    explain: bool = False,
    html: Path | None = None,
) -> None:
    """Print how good a checkpoint is: on its validation images, or on a labelled folder or CSV.

    Each fold of a run is judged on the images it never saw, and all together on others. `html`
    names a file for the report with pictures.

    Raises:
        InputError: checkpoint or data cannot be used.
        PortableAmpError: the checkpoint is unreadable, or there is no such device.
    """
    trained = load_trained(checkpoint, overrides)
    first = trained[0]
    ctx = make_context(first.config)
    print(ctx.explain() if explain else ctx.summary())
    if html:  # what is wrong is to be found before anything is computed
        check_output(html)
        _history(trained)
    if data is None:
        parts = [(unseen(one, skip_bad=skip_bad), [one]) for one in trained]
    else:
        found, _ = read_labelled(data, images, first.classes)
        parts = [(check_images(found, skip_bad=skip_bad), trained)]
    samples = [sample for part, _ in parts for sample in part]
    probs = torch.cat(
        [predict_samples(models, part, ctx, tta=tta, passes=mc_dropout) for part, models in parts]
    )
    about = f"{checkpoint} on {len(samples)} {'validation ' if data is None else ''}images"
    about += ", averaged over views" if tta else ""
    print(about)
    print(report(probs, [sample.label for sample in samples], first.classes))
    if html:
        picture(html, trained, samples, probs, about)


def picture(
    html: Path, trained: Sequence[Trained], samples: Sequence[Sample], probs: torch.Tensor, on: str
) -> None:
    """Write report.html, with the curves of the training if it is of one run; `on` says on what."""
    from cv_classification.report import Judged, write_report  # matplotlib takes a second

    first, history = trained[0], _history(trained)
    settings = first.config.model_dump(mode="json")
    judged = Judged(samples, probs, first.classes)
    write_report(html, first.config.output.name, settings, history, judged, on)
    print(f"report: {html}")


def _history(trained: Sequence[Trained]) -> list[Row]:
    return read_history(trained[0].path.with_name("metrics.jsonl")) if len(trained) == 1 else []


def unseen(trained: Trained, *, skip_bad: bool) -> list[Sample]:
    """The validation images of a trained model.

    Raises:
        InputError: the data has changed since.
    """
    found = read_split(trained.config, skip_bad=skip_bad, cached=False)
    if found.digest != trained.split:
        raise InputError(
            f"{trained.config.data.path} has changed since {str(trained.path)!r} was trained, "
            "so which images it never saw is not known; --data names others"
        )
    return found.validation
