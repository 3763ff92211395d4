"""docs/extending.md as a reader uses it: its files are written out, each of its commands is started from their folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy import stats

from rlvr.algos import Algorithm
from rlvr.compose import recipes_dir
from rlvr.log import read_metrics
from rlvr.model import load_policy, load_tokenizer
from rlvr.rollout import Engine
from rlvr.rollout.batch import pad_rows
from rlvr.scoring import PolicyScorer
from rlvr.types import InputError, Prompt, Request, Rollout, Sampling

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "extending.md").read_text()
SMALL = ["trainer.steps=1", "trainer.prompts_per_step=4", "trainer.responses_per_prompt=5", "boundary.every=0"]
PROGRAMS = {"rlvr": ["-m", "rlvr"], "torchrun": ["-m", "torch.distributed.run"]}


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of the page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def files() -> dict[str, str]:
    """The page's files by the names in their first lines."""
    bodies = [body for language, body in blocks() if language]
    return {body.splitlines()[0].removeprefix("# "): body for body in bodies}


def commands() -> list[str]:
    lines = "".join(body for language, body in blocks() if not language).replace("\\\n", " ")
    return [" ".join(line.split()) for line in lines.splitlines()]


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """Environment and words of a command, the words as this Python starts them."""
    words = shlex.split(command)
    count = next(place for place, word in enumerate(words) if "=" not in word)
    environment = dict(word.split("=", 1) for word in words[:count])
    return environment, [sys.executable, *PROGRAMS[words[count]], *words[count + 1 :]]


def run_dir(command: str) -> str:
    return re.findall(r"run_dir=(\S+)", command)[0]


def settings_of_own_classes(words: list[str]) -> dict[str, dict[str, Any]]:
    """Group -> what config.yaml must say of it, for every group that the command fills with a class of the page."""
    pairs = [word.split("=", 1) for word in words if re.match(r"\w+(\.\w+)*=", word)]
    own: dict[str, dict[str, Any]] = {}
    for key, value in pairs:
        group, _, setting = key.partition(".")
        if f"mine/{group}/{value}.yaml" in files():
            own[group] = yaml.safe_load(files()[f"mine/{group}/{value}.yaml"])
        elif [group, "custom"] in pairs and setting:
            own.setdefault(group, {})[setting] = yaml.safe_load(value)
    return own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Path:
    """A folder with the page's files, the examples at their place in a clone, and a base model where the page has one."""
    made = tmp_path_factory.mktemp("extending")
    for name, body in files().items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(body)
    shutil.copytree(ROOT / "docs" / "examples", made / "docs" / "examples")
    shutil.copytree(tiny_model, made / "runs" / "countdown_base")
    return made


@pytest.fixture
def page_modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's Python files can be imported."""
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if f"{name}.py" in files():
            del sys.modules[name]


def start(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    paths = [environment.get("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH")]
    joined = {**os.environ, "OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=joined, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("command", commands(), ids=run_dir)
def test_command_of_the_page(command: str, folder: Path, tiny_model: str) -> None:
    environment, words = split(command)
    if "backend=ddp" in words and not (recipes_dir() / "backend" / "ddp.yaml").exists():
        pytest.skip("there is no back end ddp yet")
    start([*words, f"model.path={tiny_model}", *SMALL], folder, environment)
    run = folder / run_dir(command)
    (row,) = read_metrics(run / "metrics.jsonl")
    assert row["step"] == 1
    assert row["mismatch/abs_diff_max"] < 1e-3  # nats; the engine's log-probs, those of the page's own engine among them
    own, record = settings_of_own_classes(words), yaml.safe_load((run / "config.yaml").read_text())
    assert own
    for group, settings in own.items():
        assert settings["_target_"] in str(record[group])
        assert record[group] == {**record[group], **settings}


def test_every_file_and_command_of_the_page_is_run() -> None:
    """Nothing on the page looks like a file or a command and is not one that the tests above and below start."""
    assert all(re.fullmatch(r"[\w/]+\.(py|yaml)", name) for name in files())
    assert len(files()) == sum(bool(language) for language, _ in blocks())
    assert len(commands()) >= 8 and len(commands()) == len(set(map(run_dir, commands())))
    assert TEXT.count("rlvr train") == len(commands())
    assert not re.findall(r"rlvr (?!train\b)(sft|boundary|report|reproduce|verify)\b", TEXT)
    used = {own["_target_"].split(".")[0] for c in commands() for own in settings_of_own_classes(split(c)[1]).values()}
    modules = {name.removesuffix(".py") for name in files() if name.endswith(".py")}
    examples = {path.stem for path in (ROOT / "docs" / "examples").glob("*.py")}
    assert used == modules - {"notebook"} | examples


def test_the_notebook_of_the_page(folder: Path) -> None:
    start([sys.executable, "notebook.py"], folder, {})
    assert [row["step"] for row in read_metrics(folder / "runs/notebook/metrics.jsonl")] == [1, 2, 3]
    record = yaml.safe_load((folder / "runs/notebook/config.yaml").read_text())
    assert record["algo"]["_target_"] == "my_algo.MedianBaseline" and record["algo"]["scale"] == 0.5
    assert (folder / "runs/notebook/report.html").is_file()


def test_table_names_what_an_algorithm_has() -> None:
    """Each name of the table exists; each public member that is no setting is on the page."""
    table = TEXT[TEXT.index("### What an algorithm may say") : TEXT.index("## Two published objectives")]
    first_column = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`(\w+)", first_column))
    assert len(named) >= 12
    assert all(hasattr(Algorithm(), name) for name in named)
    settings = {item.name for item in fields(Algorithm)}
    members = {name for name in vars(Algorithm) if not name.startswith("_")} - settings
    assert members <= set(re.findall(r"\b(\w+)\b", table)), "a member of Algorithm is not on the page"


def test_reward_and_task_of_the_page_do_what_they_say(page_modules: None) -> None:
    task = import_module("my_task").Sums(largest=4)
    train, test = ({p.text: p.gold for p in task.prompts(split)} for split in ("train", "test"))
    assert (len(train), len(test)) == (17, 8) and not set(train) & set(test)
    assert train | test == {f"{a}+{b}=": a + b for a in range(5) for b in range(5)}
    prompt = Prompt(id="p", text="3+4=", gold=7, source="sums/test")
    rollouts = [
        Rollout("p", i, 0, (1,), tuple(range(6)), (0.0,) * 6, "stop", text, 0) for i, text in enumerate(("7", "8", "=", "07"))
    ]
    plain = task.reward().judge([prompt] * 4, rollouts)
    assert [(v.score, v.correct, v.status) for v in plain[:3]] == [
        (1.0, True, "graded"),
        (0.0, False, "graded"),
        (0.0, False, "unparsed"),
    ]
    brief = import_module("my_reward").Brief(per_token=0.05, verifier=task.reward())
    assert [v.score for v in brief.judge([prompt] * 4, rollouts)] == pytest.approx([0.7, 0.0, 0.0, 0.7])
    assert [v.correct for v in brief.judge([prompt] * 4, rollouts)] == [v.correct for v in plain]
    with pytest.raises(InputError, match="per_token: got -1"):
        import_module("my_reward").Brief(per_token=-1.0)


# ---- what the page's engine must hold ---------------------------------------------------------------------------------


@pytest.fixture
def engine(page_modules: None, tiny_model: str) -> Any:
    made = import_module("my_engine").PromptByPrompt()
    made.load(tiny_model, [load_tokenizer(tiny_model).eos_token_id])
    return made


def prompts(path: str) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(path)
    return [tuple(tokenizer(text)["input_ids"]) for text in ("8 3 4:20?", "1 2 3 4:10?")]


def test_page_engine_returns_the_log_probs_of_what_it_drew(engine: Any, tiny_model: str) -> None:
    """At a temperature, for prompts of different lengths, and after new weights: the trainer's own log-probs."""
    assert isinstance(engine, Engine)
    asked = [Request(prompt, tuple(range(40))) for prompt in prompts(tiny_model)]
    model = load_policy(tiny_model)
    for temperature in (1.0, 0.7):
        drawn = engine.generate(asked, Sampling(max_new_tokens=10, temperature=temperature))
        rows = [(request.prompt_tokens, c.tokens) for request, group in zip(asked, drawn, strict=True) for c in group]
        batch = pad_rows(rows, 0)
        with torch.no_grad():
            expected = PolicyScorer(model)(batch.tokens, batch.response_mask, temperature)[0][batch.response_mask]
        got = torch.tensor([value for group in drawn for c in group for value in c.logprobs])
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        engine.update_weights(model.named_parameters(remove_duplicate=False))


def test_page_engine_follows_the_protocol(engine: Any, tiny_model: str) -> None:
    """Own seeds, stop token, length limit, greedy rows."""
    sampling, stop = Sampling(max_new_tokens=10), load_tokenizer(tiny_model).eos_token_id
    short, long = prompts(tiny_model)
    together = engine.generate([Request(short, tuple(range(50))), Request(long, (7, 8))], sampling)
    assert engine.generate([Request(short, (3,))], sampling)[0][0].tokens == together[0][3].tokens
    assert len({c.tokens for c in together[0]}) > 45
    completions = [c for group in together for c in group]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert len(c.tokens) == len(c.logprobs) <= 10
        assert stop not in c.tokens[:-1] and (c.tokens[-1] == stop) == (c.finish_reason == "stop")
    greedy = engine.generate([Request(short, (0, 1), greedy=True)], sampling)[0]
    likely = load_policy(tiny_model)(torch.tensor([short])).logits[0, -1].argmax()
    assert greedy[0] == greedy[1] and greedy[0].tokens[0] == int(likely)


def test_page_engine_draws_from_the_models_distribution(engine: Any, tiny_model: str) -> None:
    """Chi-square of 4,000 first tokens against the softmax at temperature 0.8."""
    prompt = prompts(tiny_model)[0]
    (group,) = engine.generate([Request(prompt, tuple(range(4000)))], Sampling(max_new_tokens=1, temperature=0.8))
    expected = torch.softmax(load_policy(tiny_model)(torch.tensor([prompt])).logits[0, -1].double() / 0.8, -1)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=len(expected))
    assert stats.chisquare(counts.numpy(), expected.detach().numpy() * 4000).pvalue > 1e-3
