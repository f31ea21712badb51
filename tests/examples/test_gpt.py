"""The GPT example: text, model, and training without Ray; once with it."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from ray_tracking.config import section
from ray_tracking.errors import UsageError
from ray_tracking.examples import gpt, gpt_model
from ray_tracking.examples.gpt import GPTParams, gpt_config, warmup_cosine
from ray_tracking.examples.gpt_model import GPT, SIZES, build, evaluate, generate, loss_of, optimizer_for
from ray_tracking.examples.gpt_text import VOCABULARY, Tokenizer, Windows, corpus
from ray_tracking.runtime.loading.loader import ResumableLoader

REPOSITORY = Path(__file__).parents[2]
TINY = SIZES["tiny"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As on Ray's workers: with models as small as these, several threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.learn(corpus()[0], VOCABULARY)


class TestText:
    def test_training_and_validation_share_no_paragraph(self) -> None:
        text, held_out = corpus()
        assert 0.09 < len(held_out) / (len(text) + len(held_out)) < 0.11
        assert len(text) > 200_000
        known = set(text.split("\n\n"))
        assert not [p for p in held_out.split("\n\n") if len(p) > 80 and p in known]

    def test_all_of_the_text_decodes_to_itself(self, tokenizer: Tokenizer) -> None:
        for text in corpus():
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids.tolist()) == text
            assert 0 <= int(ids.min()) <= int(ids.max()) < VOCABULARY
            assert len(ids) < len(text) / 2.5, "pairs make it shorter"

    @pytest.mark.parametrize("text", ["", "a", "aa", "aaaaaaa", "ж – 漢字 🙂\x00", "    \n\n  def f(): ..."])
    def test_any_text_decodes_to_itself(self, tokenizer: Tokenizer, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text

    def test_the_most_frequent_pair_becomes_a_token(self) -> None:
        learned = Tokenizer.learn("abababab x", 258)
        assert learned.tokens[256:] == [b"ab", b"abab"]
        assert learned.encode("ababab").tolist() == [257, 256]

    def test_of_a_row_of_equal_tokens_pairs_are_taken_from_the_left(self) -> None:
        learned = Tokenizer([(97, 97)])
        assert learned.encode("aaaaa b aaa aa").tolist() == [256, 256, 97, 32, 98, 32, 256, 97, 32, 256]

    def test_bytes_that_are_no_text_decode_too(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.decode([0xC3, 0x28]) == "\ufffd("


class TestWindows:
    @pytest.mark.parametrize("length", [11, 101, 102, 109])
    def test_they_cover_the_text_in_order(self, length: int) -> None:
        windows = [window.tolist() for window in windows_of(Windows(torch.arange(length), 10))]
        assert len(windows) == math.ceil((length - 1) / 10)
        assert {token for window in windows for token in window[1:]} == set(range(1, length))
        assert windows == sorted(windows)

    @pytest.mark.parametrize("count", [None, 1, 7, 50])
    def test_each_epoch_moves_them_and_none_leaves_the_text(self, count: int | None) -> None:
        windows = Windows(torch.arange(95), 10, count)
        begins = []
        for epoch in range(12):
            windows.set_epoch(epoch)
            for window in windows_of(windows):
                assert window.tolist() == list(range(int(window[0]), int(window[0]) + 11))
            begins.append(int(windows[0][0]))
        assert len(set(begins)) > 6
        windows.set_epoch(0)
        assert int(windows[0][0]) == begins[0], "the epoch's number alone says where they lie"


def windows_of(windows: Windows) -> list[torch.Tensor]:
    return [windows[index] for index in range(len(windows))]


class TestModel:
    def test_no_token_sees_a_later_one(self) -> None:
        torch.manual_seed(0)
        model = GPT(TINY).eval()
        tokens = torch.randint(VOCABULARY, (1, 20))
        changed = tokens.clone()
        changed[0, 12] = (tokens[0, 12] + 1) % VOCABULARY
        with torch.no_grad():
            before, after = model(tokens)[0], model(changed)[0]
        assert torch.equal(before[:12], after[:12])
        differs = (before[12:] != after[12:]).any(dim=1)
        assert differs.all(), "and each sees all earlier ones"

    def test_the_order_of_earlier_tokens_counts(self) -> None:
        torch.manual_seed(0)
        model = GPT(TINY).eval()
        with torch.no_grad():
            one, other = model(torch.tensor([[5, 9, 7], [9, 5, 7]]))
        assert not torch.allclose(one[2], other[2], atol=1e-4)

    @pytest.mark.parametrize("size", ["tiny", "small", "medium"])
    def test_at_first_it_knows_nothing(self, size: str) -> None:
        torch.manual_seed(0)
        windows = torch.randint(VOCABULARY, (4, 65))
        with torch.no_grad():
            loss = loss_of(GPT(SIZES[size]), windows).item()
        assert loss == pytest.approx(math.log(VOCABULARY), abs=0.15)

    def test_it_learns_one_batch_by_heart(self, tokenizer: Tokenizer) -> None:
        torch.manual_seed(0)
        model = GPT(TINY)
        optimizer = optimizer_for(model, 1e-2)
        batch = tokenizer.encode(corpus()[0])[: 4 * 33].view(4, 33)
        for _ in range(80):
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.2

    def test_only_matrices_decay(self) -> None:
        model = GPT(TINY)
        decays = {
            id(p): group["weight_decay"] for group in optimizer_for(model, 1e-3).param_groups for p in group["params"]
        }
        assert len(decays) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            assert (decays[id(parameter)] > 0) == (not name.endswith("bias") and "norm" not in name), name

    def test_validation_is_the_mean_over_all_tokens(self) -> None:
        """Whatever the batches; dropout is off in it and on again afterwards."""
        torch.manual_seed(0)
        model = GPT(TINY, dropout=0.5).train()
        tokens = torch.randint(VOCABULARY, (10 * 16 + 5,))
        one_by_one = [loss_of(model.eval(), tokens[None, i : i + 17]).item() for i in range(0, 160 - 15, 16)]
        model.train()
        for batch_size in (3, 32):
            assert evaluate(model, tokens, 16, batch_size) == pytest.approx(sum(one_by_one) / 10, abs=1e-5)
        assert model.training
        assert not torch.equal(model(tokens[None, :16]), model(tokens[None, :16]))

    def test_generated_text_decodes_and_disturbs_nothing(self, tokenizer: Tokenizer) -> None:
        torch.manual_seed(0)
        model = GPT(TINY, dropout=0.1)
        before = torch.get_rng_state()
        prompt = tokenizer.encode("The ")
        written = [generate(model, prompt, 30, context=16, seed=seed) for seed in (1, 1, 2)]
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(written[0], written[1])
        assert not torch.equal(written[0], written[2])
        assert len(written[0]) == len(prompt) + 30
        assert tokenizer.decode(written[0].tolist()).startswith("The ")


class TestSizes:
    def test_the_table_is_true(self) -> None:
        rows = re.findall(r"^\| (\w+) +\|(.+)\|$", gpt_model.__doc__ or "", re.MULTILINE)[1:]
        assert [name for name, _ in rows] == list(SIZES)
        for name, cells in rows:
            width, layers, heads, parameters, state = (cell.strip().replace(",", "") for cell in cells.split("|"))
            size = SIZES[name]
            assert (int(width), int(layers), int(heads)) == (size.width, size.layers, size.heads)
            assert int(parameters) == gpt_model.parameter_count(name)
            assert float(state.removesuffix(" MB")) == pytest.approx(gpt_model.state_bytes(name) / 1e6, abs=0.05)

    @pytest.mark.parametrize("name", ["tiny", "small"])
    def test_a_built_state_is_as_large_as_said(self, name: str) -> None:
        before = torch.get_rng_state()
        model, optimizer = build(name)
        assert torch.equal(torch.get_rng_state(), before)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [*model.state_dict().values(), *moments]
        assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == gpt_model.state_bytes(name)
        assert len(optimizer.state) == len(list(model.parameters()))
        filled = [value for value in moments if value.dim() > 0]
        assert all((value != 0).float().mean() > 0.99 for value in filled), "zeros would compress as no real state does"

    def test_a_built_state_is_the_same_each_time(self) -> None:
        one, other = (build("tiny") for _ in range(2))
        assert all(map(torch.equal, one[0].state_dict().values(), other[0].state_dict().values()))

    def test_the_sizes_that_params_allow_are_those(self) -> None:
        for name in SIZES:
            assert section(GPTParams, {"size": name}).size == name
        with pytest.raises(UsageError, match=f"one of {', '.join(SIZES)}"):
            section(GPTParams, {"size": "huge"})


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0.0, 0.1), (0.025, 0.55), (0.05, 1.0), (0.525, 0.55), (1.0, 0.1), (1.5, 0.1)],
)
def test_schedule(progress: float, factor: float) -> None:
    assert warmup_cosine(progress) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"size": "huge"}, r'params\.size: found "huge" .*one of tiny, small, medium, large'),
        ({"batchsize": 4}, r"params\.batchsize is not a known key. Did you mean params\.batch_size"),
        ({"epochs": 0}, r"params\.epochs: found 0 .*at least 1"),
        ({"context": 1}, r"params\.context: found 1 .*at least 2"),
        ({"dropout": 1.0}, r"params\.dropout: found 1\.0 .*at most 0\.9"),
        ({"lr": "fast"}, r'params\.lr: found "fast" .*above 0'),
    ],
)
def test_wrong_params_are_refused_before_anything_else(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gpt.train(SimpleNamespace(params=params))  # type: ignore[arg-type]


def test_the_file_says_what_the_function_says() -> None:
    assert yaml.safe_load((REPOSITORY / "configs" / "gpt.yaml").read_text()) == gpt_config()
    section(GPTParams, gpt_config()["params"], key="params")


class Interrupted(Exception):
    pass


class OneRank:
    """A `run` of one rank in this process. Keeps the state after each step; `die_at`: raises before that step."""

    def __init__(self, params: dict[str, Any], *, resume: dict[str, Any] | None = None, die_at: int = 0) -> None:
        self.params = {"size": "tiny", "epochs": 2, "batch_size": 4, "context": 32, "samples_per_epoch": 22, **params}
        self.config = SimpleNamespace(seed=3)
        self.rank, self.world_size, self.step = 0, 1, 0
        self.device = torch.device("cpu")
        self.metrics: dict[tuple[str, int], float] = {}
        self.texts: dict[int, str] = {}
        self.kept: dict[str, Any] = {}
        self._resume = resume
        self._die_at = die_at
        self._first = 0
        torch.manual_seed(3)

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    def log_params(self, params: dict[str, Any]) -> None:
        self.logged_params = params

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        self.metrics |= {
            (key, self.step): float(torch.as_tensor(value).detach())
            for key, value in metrics.items()
            if key != "train/tokens_per_second"  # how fast it was is the one thing that differs
        }

    def log_text(self, key: str, text: str) -> None:
        assert key == "samples"
        self.texts[self.step] = text

    def loader(self, data: Any, batch_size: int, shuffle: bool) -> ResumableLoader:
        self._loader = ResumableLoader(data, batch_size, shuffle=shuffle, seed=3, rank=0, world_size=1)
        return self._loader

    def restore(self, **objects: Any) -> None:
        self._objects = objects
        if self._resume is not None:
            for name, value in objects.items():
                value.load_state_dict(copy.deepcopy(self._resume[name]))
            self.step, self._first = self._resume["step"], self._resume["epoch"]
            torch.set_rng_state(self._resume["random"])

    def state(self) -> dict[str, Any]:
        states = {name: value.state_dict() for name, value in self._objects.items()}
        return copy.deepcopy({**states, "step": self.step, "epoch": self.epoch, "random": torch.get_rng_state()})

    def epochs(self, total: int) -> Iterator[int]:
        for epoch in range(self._first, total):
            self.epoch = epoch
            self._loader.begin_epoch(epoch)
            yield epoch

    def steps(self, loader: ResumableLoader) -> Iterator[torch.Tensor]:
        for batch in loader:
            if self.step + 1 == self._die_at:
                raise Interrupted
            self.step += 1
            yield batch
            self.kept = self.state()


def trained(params: dict[str, Any], **options: Any) -> OneRank:
    run = OneRank(params, **options)
    gpt.train(run)  # type: ignore[arg-type]
    return run


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


DROPPING = {"dropout": 0.2, "sample_tokens": 10}


class TestTraining:
    @pytest.fixture(scope="class", autouse=True)
    def learned(self, tokenizer: Tokenizer) -> Iterator[None]:
        """Learning the tokens takes a second, and is not what is tested here."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tokenizer, "learn", lambda _text, _size: tokenizer)
            yield

    @pytest.fixture(scope="class")
    def whole(self, learned: None) -> OneRank:
        return trained(DROPPING)

    def test_what_is_logged(self, whole: OneRank) -> None:
        assert whole.step == 12, "2 epochs of 22 samples, 4 at a time"
        assert whole.logged_params == {"parameters": gpt_model.parameter_count("tiny")}
        by_key: dict[str, list[int]] = {}
        for key, step in whole.metrics:
            by_key.setdefault(key, []).append(step)
        every = list(range(1, 13))
        assert by_key == {
            "train/loss": every,
            "train/gradient_norm": every,
            "train/lr": every,
            "val/loss": [6, 12],
            "epoch": [6, 12],
        }
        assert list(whole.texts) == [6, 12]
        assert all(text.startswith("The ") for text in whole.texts.values())
        rates = [whole.metrics["train/lr", step] / TINY.lr for step in every]
        assert rates[0] == pytest.approx(0.1)
        assert rates[1:] == sorted(rates[1:], reverse=True)
        assert rates[6] == pytest.approx(warmup_cosine(0.5))

    def test_the_same_seed_gives_the_same_run(self, whole: OneRank) -> None:
        again = trained(DROPPING)
        assert again.metrics == whole.metrics
        assert again.texts == whole.texts
        assert_same(again.kept, whole.kept)

    @pytest.mark.parametrize("die_at", [4, 7, 9], ids=["inside the first epoch", "between epochs", "inside the second"])
    def test_interrupted_and_resumed_it_comes_to_the_same_end(self, whole: OneRank, die_at: int) -> None:
        run = OneRank(DROPPING, die_at=die_at)
        with pytest.raises(Interrupted):
            gpt.train(run)  # type: ignore[arg-type]
        torch.rand(7)  # whatever else draws random numbers meanwhile
        resumed = trained(DROPPING, resume=run.kept)
        assert {**run.metrics, **resumed.metrics} == whole.metrics
        assert {**run.texts, **resumed.texts} == whole.texts
        assert_same(resumed.kept, whole.kept)

    def test_no_text_if_none_is_wanted(self) -> None:
        assert trained({"sample_tokens": 0, "epochs": 1, "samples_per_epoch": 4}).texts == {}


@pytest.mark.ray
@pytest.mark.slow  # in short, the chaos command's test trains it on Ray
def test_on_ray(ray_cluster: None, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Two workers: it learns, writes text, and leaves a checkpoint that a model and an optimizer take."""
    from ray_tracking import TrainingManager, get_config
    from ray_tracking.checkpoint import CheckpointStore
    from ray_tracking.journal.reader import JournalReader
    from ray_tracking.records import Kind
    from ray_tracking.runs.store import RunStore
    from ray_tracking.storage import Storage

    params = {
        "size": "tiny",
        "epochs": 2,
        "samples_per_epoch": 360,
        "context": 64,
        "batch_size": 6,
        "sample_tokens": 30,
    }
    settings = {**gpt_config(), "params": params, "storage": str(tmp_path)}
    result = TrainingManager(get_config("testing", settings)).fit(gpt.train)
    assert result.status == "completed"
    assert result.last_step == 60

    journal = JournalReader(RunStore(Storage.open(tmp_path)).directory(result.run_id))
    records = list(journal.effective_records())
    losses = [record.value for record in records if record.key == "val/loss"]
    assert math.log(VOCABULARY) > losses[0] > losses[1]
    texts = [record.data.decode() for record in records if record.kind is Kind.TEXT and record.data is not None]
    assert [text[:4] for text in texts] == ["The ", "The "]

    loaded = CheckpointStore(Storage.open(result.path)).load_latest()
    assert loaded is not None
    assert loaded.step == 60
    model = GPT(TINY)
    optimizer = optimizer_for(model, 1.0)
    model.load_state_dict(loaded.model_state)
    optimizer.load_state_dict(loaded.optimizer_state)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(TINY.lr * warmup_cosine(1.0))
    assert evaluate(model, tokenizer.encode(corpus()[1]), 64) == pytest.approx(losses[1], abs=1e-4)
