"""The command line: parses, calls one function, prints. Imports nothing heavy before it knows the verb."""

import errno
import json
import os
import sys
import time
import warnings

from dynaconv.errors import DynaconvError, UserError, unknown

TYPE_CHECKING = False  # typing's constant of this name, without the import: the help answers at once
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO


HELP = """\
usage: dynaconv VERB ... [--json]

Trains, judges and ships image classifiers for small images, CIFAR-10 first.

verbs:
  train [RECIPE] [--data SOURCE] [--run-dir DIR] [--seeds N] [--SETTING VALUE]
             train a classifier, judge it once on the test images, write a run
  check SOURCE [--into DIR]
             look for duplicates, contradicting labels, odd and damaged files; exit code 1 if there are any
  labels SOURCE [--folds N] [--most N] [--into DIR]
             find training images whose label is doubtful; `train --without` leaves them out
  resume DIR
             go on with a run that was stopped, to the result of one that never was
  evaluate RUN [--split test] [--mixture] [--explain] [--robustness]
             judge a run's network: intervals, every class, calibration, the mixture, corruptions
  compare A B [--split validation] [--into DIR]
             say whether one run, or several with different seeds, is really better than another
  report RUN [RUN ...] [--into FILE]
             write one HTML page about a run, or several side by side, and a model card
  predict RUN|FILE.onnx PICTURE... [--top N] [--form jsonl]
             classify pictures: files, folders, patterns, or - for paths from standard input
  export RUN [--format onnx|pt2] [--int8] [--fold] [--max-drop 0.003] [--into FILE] [--split test]
             write the classifier as one file, with a certificate of what it computes and costs
  serve RUN|FILE.onnx [--host H] [--port P]
             answer over HTTP, requests batched together, with a page to drop pictures on
  publish RUN --into DIR [--license mit] [--push OWNER/NAME] [--public]
             write the classifier as a folder for others, with a model card; upload it only if asked to
  verify FILE.onnx [--data SOURCE] [--split test]
             repeat the proof of that file on this machine, without torch
  recipes    the named recipes, with what each costs and reaches

options:
  --json     print exactly one JSON document on standard output, all else on standard error
  --version  print the version
  --help     this text; `dynaconv VERB --help` for a verb's own

examples:
  dynaconv train                                   CIFAR-10 if it can be had, else small digits
  dynaconv train --data my-pictures --epochs 20    a folder with one folder per class
  dynaconv train runs/first/recipe.json            the same run again

exit codes: 0 done, 1 the work failed, 2 something to change in the command or the data, 130 stopped (a server: 0)
"""


AGAIN = 1.0
"""Seconds after which a SIGTERM comes again: Python drops an exception that is raised in the callback of a weak
reference or the end of an object, and a training frees many."""


def main(arguments: "list[str] | None" = None) -> int:
    """Runs the command line and returns its exit code; `arguments` defaults to those of the process."""
    started = time.time()
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    # What is meant for people goes to standard error when standard output belongs to the JSON document.
    people = sys.stderr if as_json else sys.stdout
    # Pillow's warning of a huge picture; such a picture is refused with a sentence of our own.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    try:
        if not words or words[0] in ("--help", "-h", "help"):
            people.write(HELP)
            return 0 if words else 2
        if words[0] in ("--version", "version"):
            from dynaconv import __version__

            document: Any = {"version": __version__}
            people.write(f"dynaconv {__version__}\n")
        elif words[0] in VERBS:
            stop_on_sigterm()
            document = VERBS[words[0]](words[1:], people, started)
        else:
            raise unknown("verb", words[0], VERBS)
        if as_json:
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        sys.stdout.flush()
        return 1 if words[0] == "check" and document["to_act_on"] else 0
    except SystemExit as end:  # a verb's --help has been printed
        return end.code if isinstance(end.code, int) else 0
    except DynaconvError as error:
        sys.stderr.write(f"dynaconv: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        _close_output()
        return 141
    except OSError as error:  # a folder that may not be entered, a name that is too long, output to a full disk
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        if error.filename is None:
            _close_output()
        sys.stderr.write(f"dynaconv: {error.filename or 'The output'} cannot be used: {error.strerror}.\n")
        return 2
    finally:
        _stop_no_more()


def _close_output() -> None:
    """Leaves nothing to flush at exit, where Python would complain once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def train(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `train`."""
    from dynaconv.arguments import parse_training

    recipe, options = parse_training(words)
    from dynaconv.experiment import check_training, run_experiment
    from dynaconv.recipes import expected_accuracy
    from dynaconv.terminal import display

    say, track = display(people)
    if options.check_resume or options.check_repeat:
        return check_training(recipe, options.check_resume, options.check_repeat, say)
    if options.seeds > 1:
        from dynaconv.seeds import run_seeds

        return run_seeds(recipe, options.seeds, options.run_dir, say, track)
    result = run_experiment(recipe, options.run_dir, say, track, started, expected_accuracy)
    say(_tell(result))
    return result


def resume(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `resume`."""
    from dynaconv.arguments import parse_resume

    path = parse_resume(words)
    from dynaconv.experiment import resume_experiment
    from dynaconv.seeds import PLAN, resume_seeds
    from dynaconv.terminal import display

    say, track = display(people)
    if (path / PLAN).exists():
        return resume_seeds(path, say, track)
    result = resume_experiment(path, say, track, started)
    say(_tell(result))
    return result


def evaluate(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `evaluate`."""
    from dynaconv.arguments import parse_evaluate

    options = parse_evaluate(words)
    from dynaconv.evaluation import evaluate_run
    from dynaconv.terminal import display

    say, _ = display(people)
    wanted = (options.mixture, options.explain, options.robustness, options.neighbours)
    others = (options.cifar10_c, options.cifar10_1, options.data)
    return evaluate_run(options.run, options.split, options.views, *wanted, *others, say)


def compare(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `compare`."""
    from dynaconv.arguments import parse_compare

    options = parse_compare(words)
    from dynaconv.evaluation import compare_runs
    from dynaconv.terminal import display

    say, _ = display(people)
    return compare_runs(options.first, options.second, options.split, options.into, say)


def report(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `report`."""
    from dynaconv.arguments import parse_report

    runs, into = parse_report(words)
    from dynaconv.reporting.report import write_report

    written = [str(path) for path in write_report(runs, into)]
    people.write(f"Report: {written[0]}\nModel card: {written[1]}\n")
    return {"report": written[0], "model_card": written[1]}


def predict(words: "list[str]", people: "TextIO", started: float) -> "list[dict[str, Any]]":
    """The verb `predict`."""
    from dynaconv.arguments import parse_predict

    pictures, options = parse_predict(words)
    from dynaconv.shipping.predictions import predict_files

    return predict_files(options.run, pictures, options.top, options.form, people, options.into, options.explain)


def export(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `export`."""
    from dynaconv.arguments import parse_export

    options = parse_export(words)
    from dynaconv.shipping.export import ExportOptions, export_run
    from dynaconv.terminal import display

    say, _ = display(people)
    same = {name: value for name, value in vars(options).items() if name not in ("run", "format", "data")}
    return export_run(options.run, ExportOptions(form=options.format, source=options.data, **same), say)


def verify(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `verify`."""
    from dynaconv.arguments import parse_verify

    options = parse_verify(words)
    from dynaconv.shipping.verify import verify_file

    return verify_file(options.file, options.data, options.split, lambda line: print(line, file=people))


def publish(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `publish`."""
    from dynaconv.arguments import parse_publish

    options = parse_publish(words)
    from dynaconv.shipping.publish import publish_run, push_folder, require_pushable

    def say(line: str) -> None:
        print(line, file=people)

    if options.push is not None:
        require_pushable(options.push)
    written = publish_run(options.run, options.into, options.license, options.overwrite, say)
    address = push_folder(options.into, options.push, options.public, say) if options.push is not None else None
    return {"into": str(options.into), "files": written, "address": address}


def serve(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `serve`."""
    from dynaconv.arguments import parse_serve

    options = parse_serve(words)
    # Of torch's threads, read when it is imported: who waits for the others by spinning takes the processor from those
    # who read the next pictures.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from dynaconv.shipping.serve import ServeSettings
        from dynaconv.shipping.server import serve as run_server
    except ImportError as error:
        raise UserError(f"Serving needs {error.name}; install it: pip install dynaconv[serve].") from error
    from dynaconv.shipping.predictions import load_classifier

    settings = ServeSettings(options.max_wait_ms, options.max_batch, options.most_waiting)
    run_server(load_classifier(options.run), options.host, options.port, settings)
    return {"served": str(options.run)}


def _tell(result: "dict[str, Any]") -> str:
    """The line that a run ends with."""
    held_out = result["validation_accuracy"]
    validation = " (no image was held out for validation)" if held_out is None else f" (validation {held_out:.4f})"
    averaged = f", {result['test_accuracy_tta']:.4f} with TTA" if "test_accuracy_tta" in result else ""
    return (
        f"Test accuracy {result['test_accuracy']:.4f}{averaged} on {result['test_images']} images, read once"
        f"{validation}. Curves and pictures: {result['run_dir']}/figures"
    )


def check(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `check`."""
    from dynaconv.arguments import parse_check

    options = parse_check(words)
    from dynaconv.data_check import check_source
    from dynaconv.terminal import display

    say, _ = display(people)
    return check_source(options.source, options.into, say)


def labels(words: "list[str]", people: "TextIO", started: float) -> "dict[str, Any]":
    """The verb `labels`."""
    from dynaconv.arguments import parse_labels

    recipe, options = parse_labels(words)
    from dynaconv.label_search import search_label_errors
    from dynaconv.terminal import display

    say, _ = display(people)
    summary = search_label_errors(recipe, options.folds, options.most, options.into, say)
    path = options.into / "candidates.csv"
    say(
        f"{summary['disputed']} of {summary['images']} labels are not the likeliest class; the {summary['written']} "
        f"most doubtful are in {path}. Look through it, take out the rows whose label is right, and train without the "
        f"rest: dynaconv train --without {path}"
    )
    return {**summary, "into": str(options.into)}


def recipes(words: "list[str]", people: "TextIO", started: float) -> "list[dict[str, Any]]":
    """The verb `recipes`."""
    from dynaconv.recipes import RECIPES

    if words and words[0] not in ("--help", "-h"):
        raise UserError(f"`dynaconv recipes` takes no arguments, received {words[0]!r}.")
    rows = []
    for name, make in RECIPES.items():
        told = (make.__doc__ or "").strip()
        people.write(f"{name}\n  {told.replace(chr(10) + '    ', chr(10) + '  ')}\n")
        rows.append({"name": name, "description": told})
    return rows


VERBS: "dict[str, Callable[[list[str], TextIO, float], Any]]" = {
    "train": train,
    "check": check,
    "labels": labels,
    "resume": resume,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "predict": predict,
    "export": export,
    "verify": verify,
    "serve": serve,
    "publish": publish,
    "recipes": recipes,
}
"""Every verb by name: a function of the words after it, the stream for people, and the time of the start."""


def stop_on_sigterm() -> None:
    """Makes SIGTERM end the work as Ctrl-C does: what is finished is kept, the exit code is 130."""
    import signal
    import threading

    def stop(*_: object) -> None:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, stop)


def _stop_no_more() -> None:
    """Calls off what `stop_on_sigterm` has coming again."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    sys.exit(main())
