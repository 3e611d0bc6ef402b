"""A run's folder: the only place that knows its files, their names and forms."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaconv.errors import UserError
from dynaconv.files import read_bounded, writing_whole
from dynaconv.recipe import Recipe
from dynaconv.recipe_json import load_recipe, to_json

if TYPE_CHECKING:
    import torch

METRICS, WEIGHTS, RESULT = "metrics.jsonl", "model.safetensors", "result.json"
LOOKS, CALIBRATION = "looks.json", "calibration.json"
FAMILIARITY, NEIGHBOURS = "familiarity.safetensors", "neighbours.safetensors"
STATE, LOCK = "state", ".lock"
MOST_JSON_BYTES, MOST_TENSOR_BYTES = 256 * 2**20, 4 * 2**30
"""Larger files in a run's folder are not read: no run writes them."""


class RunDir:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        """Points at a run's folder; `create` makes it, `open` checks that it is there."""
        self.path = path

    @classmethod
    def create(cls, path: Path) -> "RunDir":
        """Makes the folder of a new run.

        Raises:
            UserError: it exists and holds something, or cannot be made.
        """
        cls.require_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "figures").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"The run folder {path} cannot be made: {error.strerror or error}.") from error
        return cls(path)

    @staticmethod
    def require_free(path: Path, option: str = "--run-dir") -> None:
        """Raises UserError if `path`, which `option` names, holds anything: what is there is never overwritten."""
        try:
            taken = path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir())))
        except OSError as error:
            raise UserError(f"The folder {path} cannot be read: {error.strerror or error}.") from error
        if taken:
            raise UserError(f"The folder {path} exists already; name another with {option} or remove it.")

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """Opens the folder of a run that exists; raises UserError if it is not one."""
        if not (path / "recipe.json").is_file():
            raise UserError(f"{path} is not the folder of a run: it has no recipe.json.")
        return cls(path)

    @property
    def has_begun(self) -> bool:
        """Whether all that is known before the first step was written; the untrained weights are the last of it."""
        return (self.path / WEIGHTS).is_file()

    def write_json(self, name: str, document: Any) -> None:
        """Writes a JSON document, whole or not at all."""
        with writing_whole(self.path / name) as temporary:
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def read_json(self, name: str, kind: type = dict) -> Any:
        """Reads a JSON document of the run, an object unless told; raises UserError if it is missing or damaged."""
        path = self.path / name
        try:
            document = json.loads(read_bounded(path, MOST_JSON_BYTES))
            if not isinstance(document, kind):
                raise ValueError("it holds something else than it should")
            return document
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({error}); the run did not get that far or was altered.") from error

    def write_recipe(self, recipe: Recipe) -> None:
        """Writes recipe.json."""
        with writing_whole(self.path / "recipe.json") as temporary:
            temporary.write_text(to_json(recipe), encoding="utf-8")

    def read_recipe(self) -> Recipe:
        """Reads recipe.json."""
        return load_recipe(self.path / "recipe.json")

    def append_metrics(self, epoch: dict[str, Any]) -> None:
        """Adds one epoch to metrics.jsonl."""
        try:
            with (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(epoch) + "\n")
        except OSError as error:
            raise UserError(f"{self.path / METRICS} cannot be written: {error.strerror or error}.") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Reads metrics.jsonl, one dictionary per epoch."""
        try:
            epochs = [json.loads(line) for line in read_bounded(self.path / METRICS, MOST_JSON_BYTES).splitlines()]
            if not all(isinstance(epoch, dict) for epoch in epochs):
                raise ValueError("a line holds something else than an epoch")
            return epochs
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path / METRICS} cannot be read: {error}.") from error

    def write_weights(self, tensors: "dict[str, torch.Tensor]") -> None:
        """Writes model.safetensors."""
        self.write_tensors(WEIGHTS, tensors)

    def read_weights(self) -> "dict[str, torch.Tensor]":
        """Reads model.safetensors; raises UserError if it is missing or damaged."""
        return self.read_tensors(WEIGHTS)

    def write_tensors(self, name: str, tensors: "dict[str, torch.Tensor]") -> None:
        """Writes named tensors as a safetensors file, which holds nothing that could be run; whole or not at all."""
        from safetensors.torch import save

        # Not save_file: on a full disk it raises an error of its own, which is no OSError.
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        with writing_whole(self.path / name) as temporary:
            temporary.write_bytes(content)

    def read_tensors(self, name: str) -> "dict[str, torch.Tensor]":
        """Reads a safetensors file of the run; raises UserError if it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(read_bounded(self.path / name, MOST_TENSOR_BYTES))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path / name} cannot be read: {error}.") from error

    def write_predictions(
        self, split: str, logits: "torch.Tensor", labels: "torch.Tensor", classes: tuple[str, ...], images_sha256: str
    ) -> None:
        """Writes predictions-SPLIT.parquet, a row for every image in the order of the split.

        Args:
            split: "validation" or "test".
            logits: (N, classes) float32.
            labels: (N,) int64.
            classes: Class names in the order of the logits.
            images_sha256: Of the images that were judged, by which two runs are told to have judged the same.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        sure, predictions = logits.softmax(1).max(1)
        table = pa.table(
            {
                "label": [classes[index] for index in labels.tolist()],
                "prediction": [classes[index] for index in predictions.tolist()],
                "right": (predictions == labels).numpy(),
                "confidence": sure.numpy(),
                "logits": pa.FixedSizeListArray.from_arrays(logits.contiguous().view(-1).numpy(), len(classes)),
            }
        ).replace_schema_metadata({"classes": json.dumps(classes), "images_sha256": images_sha256})
        with writing_whole(self.path / f"predictions-{split}.parquet") as temporary:
            pq.write_table(table, temporary)

    def read_predictions(self, split: str) -> "tuple[torch.Tensor, torch.Tensor, tuple[str, ...], str]":
        """Reads what `write_predictions` wrote: logits, labels, classes, and the hash of the images."""
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq
        import torch

        path = self.path / f"predictions-{split}.parquet"
        if not path.exists():
            raise UserError(
                f"{self.path} holds no predictions for its {split} images; `dynaconv evaluate {self.path} --split "
                f"{split}` makes them."
            )
        try:
            table = pq.read_table(io.BytesIO(read_bounded(path, MOST_TENSOR_BYTES)), columns=["label", "logits"])
            about = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
            classes = tuple(str(name) for name in json.loads(about["classes"]))
            place = {name: index for index, name in enumerate(classes)}
            labels = torch.tensor([place[name] for name in table["label"].to_pylist()], dtype=torch.int64)
            rows = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            logits = torch.tensor(rows, dtype=torch.float32).view(len(labels), len(classes))
            return logits, labels, classes, about["images_sha256"]
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: it is damaged, or was written by something else.") from error

    def add_look(self, command: str) -> int:
        """Records a look at the test images, before it is taken; returns how many there were, this one included.

        The run must be `locked`: of two looks at the same time one would be lost.
        """
        looks = [*self.looks(), {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": command}]
        self.write_json(LOOKS, looks)
        return len(looks)

    def looks(self) -> list[Any]:
        """Returns the looks that were taken at the test images, the oldest first."""
        if not (self.path / LOOKS).exists():
            ended = (self.path / RESULT).exists()  # a run from before looks were listed: its end was one
            return [{"time": None, "command": "the end of the training"}] if ended else []
        looks = self.read_json(LOOKS, list)
        if not all(isinstance(look, dict) and {"time", "command"} <= look.keys() for look in looks):
            raise UserError(f"{self.path / LOOKS} is no list of looks; it was altered.")
        return looks

    def write_metrics(self, epochs: list[dict[str, Any]]) -> None:
        """Writes metrics.jsonl anew: what a stored state does not know of is trained again."""
        with writing_whole(self.path / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs), encoding="utf-8")

    def write_state(self, tensors: "dict[str, torch.Tensor]", facts: dict[str, Any]) -> None:
        """Stores the state of a training under a name that holds its own hash; the last two are kept."""
        from safetensors.torch import save

        content = save(tensors, metadata={"facts": json.dumps(facts)})
        digest = hashlib.sha256(content).hexdigest()[:16]
        folder = self.path / STATE
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror or error}.") from error
        path = folder / f"{facts['epoch']:06d}-{facts['updates']:08d}-{digest}.safetensors"
        with writing_whole(path) as temporary:
            temporary.write_bytes(content)
        # What lies further on than this state could not be read, or the training would have gone on from there.
        newest_first = self._states()
        place = newest_first.index(path)
        for other in newest_first[:place] + newest_first[place + 2 :]:
            other.unlink(missing_ok=True)

    def read_state(self, say: Callable[[str], None]) -> "tuple[dict[str, torch.Tensor], dict[str, Any]] | None":
        """Reads the newest stored state that is whole, or None; names each that is torn and passes over it."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        for path in self._states():
            try:
                content = read_bounded(path, MOST_TENSOR_BYTES)
                if hashlib.sha256(content).hexdigest()[:16] != path.stem.rpartition("-")[2]:
                    raise ValueError("it is torn or was altered")
                header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
                return load(content), json.loads(header["__metadata__"]["facts"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
                say(f"The stored state {path} cannot be used ({error}); the one before it is.")
        return None

    def remove_state(self) -> None:
        """Removes all stored states: the run has ended."""
        for path in self._states():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or somebody keeps something in it
            (self.path / STATE).rmdir()

    def remove_unfinished(self) -> None:
        """Removes what a process that was killed left half-written; the run must be locked."""
        for path in self.path.rglob(".*"):
            if path.is_file() and path.name != LOCK:
                path.unlink(missing_ok=True)

    def _states(self) -> list[Path]:
        """Stored states, the newest first."""
        return sorted((self.path / STATE).glob("??????-????????-*.safetensors"), reverse=True)

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Keeps other processes out of the run; raises UserError if one is in it."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"Another process is at work in {self.path}; wait for it, or stop it.") from None
        except OSError as error:
            raise UserError(f"{self.path / LOCK} cannot be made: {error.strerror or error}.") from error
        # The file stays: removing it would let two others in, one by the file that is gone and one by a new one.
        try:
            yield
        finally:
            lock.release()

    def figure(self, name: str) -> Path:
        """Returns where the figure `name` (without ending) lies."""
        return self.path / "figures" / f"{name}.png"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard events."""
        return self.path / "tensorboard"
