"""Publication: a classifier as a folder for others, in the layout of the Hugging Face hub, and its way there."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dynaconv.errors import UserError, WorkError
from dynaconv.files import making_whole
from dynaconv.judging.trained import load_trained, require_finished
from dynaconv.reporting.report import render_card
from dynaconv.rundir import CALIBRATION, FAMILIARITY, RESULT, WEIGHTS, RunDir
from dynaconv.shipping.certificate import hash_weights

TOKEN, ENDPOINT = "HF_TOKEN", "HF_ENDPOINT"
HUB = "https://huggingface.co"
CARD = "README.md"
AS_THEY_ARE = (WEIGHTS, FAMILIARITY, CALIBRATION, "model.json")
NAMING_THE_SOURCE = ("recipe.json", RESULT)
"""Where the images came from stands in these; a folder of this machine is nobody's business."""
PATHS = ("without",)
"""What is a path in them, whatever it looks like."""
FIGURES = ("curves", "grid")
EXPORTS, CERTIFICATE = ("*.onnx", "*.pt2"), ".certificate.json"
LIBRARY = {"library_name": "dynaconv"}
"""What a card says of whose it is, and by which a publication is known again."""
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LICENSE = re.compile(r"[\w.+-]+", re.ASCII)


def publish_run(
    run: Path, into: Path, license_id: str | None, overwrite: bool, say: Callable[[str], None] = print
) -> list[str]:
    """Writes the classifier of a finished run as a folder: weights, settings, model card, and exports if there are any.

    `Classifier.load` takes the folder as it takes a run. It holds no image but the card's figures, no name of a folder,
    a user or a machine, and nothing of how far other trainings got.

    Args:
        run: Folder of the run.
        into: The folder, made as a whole or not at all.
        license_id: Identifier of a licence for the card; None names none.
        overwrite: Replace the folder, if `publish_run` wrote all that is in it.
        say: Shows a line to the user.

    Returns:
        The names of the files, sorted.

    Raises:
        UserError: no finished run, an export that is not of this run, a licence that is no identifier, or a folder that
            holds something else or cannot be made.
    """
    if license_id is not None and not _LICENSE.fullmatch(license_id):
        raise UserError(f"--license takes an identifier like mit or apache-2.0, received {license_id!r}.")
    require_finished(run)
    trained = load_trained(run, torch.device("cpu"))
    if run.resolve().is_relative_to(into.resolve()):
        raise UserError(f"{into} is or holds the run itself; name another folder with --into.")
    _require_room(into, overwrite)
    source = _without_folder(trained.recipe.data.source)
    with making_whole(into) as draft:
        _copy(run, draft)
        card = render_card(run, source)  # which refuses figures that are not as a run writes them
        (draft / CARD).write_text(_front_matter(trained.run, source, license_id) + card, encoding="utf-8")
    written = sorted(str(path.relative_to(into)) for path in into.rglob("*") if path.is_file())
    say(f"{into}: {', '.join(written)}")
    return written


def require_pushable(name: str) -> None:
    """Raises UserError if something is missing for an upload, before anything is done."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(f"--push takes OWNER/NAME, received {name!r}.")
    if not os.environ.get(TOKEN):
        raise UserError(f"Set {TOKEN} to a token of the hub that may write; it says who uploads {name}.")
    _hub()


def push_folder(folder: Path, name: str, public: bool, say: Callable[[str], None] = print) -> str:
    """Uploads a published folder to the hub, in one commit, making the repository where there is none.

    Args:
        folder: What `publish_run` wrote.
        name: OWNER/NAME.
        public: Whether a repository that is made can be seen by everybody; one that is there stays as it is.
        say: Shows a line to the user.

    Returns:
        Its address.

    Raises:
        UserError: no token, a wrong name, or no huggingface_hub.
        WorkError: the hub refused, or could not be reached; nothing was changed there but an empty repository made.
    """
    require_pushable(name)
    hub = _hub()
    endpoint = os.environ.get(ENDPOINT, HUB).rstrip("/")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"Uploading {size / 1e6:.1f} MB to {endpoint}/{name}, {'for everybody' if public else 'private'}.")
    api = hub.HfApi(endpoint=endpoint, token=os.environ[TOKEN])
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Publish a classifier")
    except hub.errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        told = error.server_message or str(error).splitlines()[0]
        raise WorkError(f"{endpoint} refused {name} ({status}): {told.rstrip('.')}.") from error
    except (OSError, RuntimeError, hub.errors.HTTPError) as error:  # RuntimeError: a large file did not get through
        raise WorkError(f"{endpoint} could not be reached: {error}.") from error
    return f"{endpoint}/{name}"


def _require_room(into: Path, overwrite: bool) -> None:
    if not into.exists():
        return
    if into.is_symlink() or not into.is_dir():
        raise UserError(f"{into} is no folder; name another with --into.")
    if not any(into.iterdir()):
        return
    if foreign := _foreign(into):
        raise UserError(f"{into} holds {foreign}, which no publication wrote; name another folder with --into.")
    if not overwrite:
        raise UserError(f"{into} holds a publication; say --overwrite to replace it, or name another with --into.")


def _foreign(folder: Path) -> str | None:
    """Returns the name of something in a folder that `publish_run` did not write there; None if it wrote all of it."""
    try:
        own = _as_yaml(LIBRARY).strip() in (folder / CARD).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        own = False
    if not own:
        return min(path.name for path in folder.iterdir())
    files = {CARD, *AS_THEY_ARE, *NAMING_THE_SOURCE, *(f"figures/{name}.png" for name in FIGURES)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_export = any(path.match(form) for form in EXPORTS) or path.name.endswith(CERTIFICATE)
        written = name == "figures" if path.is_dir() else name in files or (is_export and path.parent == folder)
        if path.is_symlink() or not written:
            return name
    return None


def _copy(run: Path, draft: Path) -> None:
    for name in AS_THEY_ARE:
        if (run / name).exists():
            shutil.copyfile(run / name, draft / name)
    for name in NAMING_THE_SOURCE:
        document = RunDir(run).read_json(name)
        (draft / name).write_text(json.dumps(_cleaned(document), indent=2) + "\n", encoding="utf-8")
    for path in sorted(path for form in EXPORTS for path in run.glob(form)):
        certificate = path.with_name(f"{path.name}{CERTIFICATE}")
        if certificate.exists():  # without the proof, it is not for others
            document = _cleaned(RunDir(run).read_json(certificate.name))
            _require_proven(path, document, run)
            shutil.copyfile(path, draft / path.name)
            (draft / certificate.name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    figures = [run / "figures" / f"{name}.png" for name in FIGURES]
    for path in figures:
        if path.exists():
            (draft / "figures").mkdir(exist_ok=True)
            shutil.copyfile(path, draft / "figures" / path.name)


def _require_proven(export: Path, certificate: Any, run: Path) -> None:
    """Raises UserError unless a certificate is of this very file, made from this very run."""
    proven = {"file_sha256": hashlib.sha256(export.read_bytes()).hexdigest(), "weights_sha256": hash_weights(run)}
    for what, digest in proven.items():
        if not isinstance(certificate, dict) or certificate.get(what) != digest:
            told = "was altered" if what == "file_sha256" else "comes from another run"
            raise UserError(f"By its certificate, {export} {told}; export it anew, or take both files away.")


def _cleaned(document: Any) -> Any:
    """Takes the folders off the paths in a JSON document."""
    if isinstance(document, dict):
        return {
            name: _file_name(value) if name in PATHS and isinstance(value, str) else _cleaned(value)
            for name, value in document.items()
        }
    if isinstance(document, list):
        return [_cleaned(value) for value in document]
    return _without_folder(document) if isinstance(document, str) else document


def _without_folder(text: str) -> str:
    looks_like_path = text.startswith(("/", "~", "./", "../", "\\")) or re.match(r"[A-Za-z]:[\\/]", text)
    return _file_name(text) if looks_like_path else text


def _file_name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _front_matter(run: RunDir, source: str, license_id: str | None) -> str:
    """Returns what the hub reads of a card: YAML, of which JSON is a part."""
    top1 = run.read_json("evaluation-test.json")["top1"]
    metric = {"type": "accuracy", "value": top1["value"], "name": f"accuracy on {top1['images']} images, one view"}
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": source, "type": source.removeprefix("hf:"), "split": "test"},
        "metrics": [metric],
    }
    facts: dict[str, Any] = {
        **LIBRARY,
        "pipeline_tag": "image-classification",
        "tags": ["dynaconv", "dynamic-convolution"],
        "model-index": [{"name": f"dynaconv {run.read_recipe().name}", "results": [result]}],
    }
    if license_id is not None:
        facts = {"license": license_id, **facts}
    return f"---\n{_as_yaml(facts)}---\n\n"


def _as_yaml(facts: dict[str, Any]) -> str:
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in facts.items())


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("--push needs huggingface_hub; install it: pip install dynaconv[hub].") from error
    return huggingface_hub
