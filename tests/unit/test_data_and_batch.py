"""From files to the padded batch and its parts: the prompt stream, padding, minibatches, micro-batches."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr.backend import SingleBackend
from rlvr.data import PairsFile, PromptStream, read_rows
from rlvr.micro_batches import MicroBatcher
from rlvr.rollout.batch import make_batch, pad_rows
from rlvr.types import Batch, InputError, Prompt, Rollout, Sampling, SamplingPlan, StepData, Verdict
from rlvr.update import TokenMeans, minibatches

BACKEND = SingleBackend(use="cpu")
BACKEND.start()
PROMPTS = [Prompt(str(index), f"question {index}", None, "test") for index in range(7)]


# ---- prompt stream ----------------------------------------------------------------------------------------------------


def ids(stream: PromptStream, count: int) -> list[str]:
    return [prompt.id for _, prompt in stream.take(count)]


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    stream = PromptStream(PROMPTS, seed=3)
    epochs = [ids(stream, 7) for _ in range(20)]
    assert all(sorted(epoch) == [prompt.id for prompt in PROMPTS] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert stream.epoch == 20.0


@pytest.mark.parametrize("sizes", [[1] * 30, [30], [7, 7, 16], [5, 9, 2, 14]])
def test_order_does_not_depend_on_how_it_is_taken(sizes: list[int]) -> None:
    whole = PromptStream(PROMPTS, seed=3).take(30)
    stream = PromptStream(PROMPTS, seed=3)
    assert [pair for size in sizes for pair in stream.take(size)] == whole
    assert [position for position, _ in whole] == list(range(30))
    assert stream.taken == 30


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 20])
def test_stream_continues_from_the_number_taken(taken: int) -> None:
    whole = PromptStream(PROMPTS, seed=3).take(30)
    assert PromptStream(PROMPTS, seed=3, taken=taken).take(30 - taken) == whole[taken:]


def test_seeds_give_different_orders() -> None:
    assert len({tuple(ids(PromptStream(PROMPTS, seed), 21)) for seed in range(20)}) == 20


def test_no_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="training set is empty"):
        PromptStream([], seed=0)


# ---- rows of files ----------------------------------------------------------------------------------------------------


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1", "answer": 2}\n\n   \n{"question": "é\\n"}\n', encoding="utf-8")
    assert read_rows(str(path)) == [{"question": "1+1", "answer": 2}, {"question": "é\n"}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_only_a_newline_ends_a_row(tmp_path: Path, separator: str) -> None:
    """JSON allows Unicode's other line ends raw inside a string, and many writers leave them there."""
    rows = [{"question": f"first{separator}second"}, {"question": "third"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_rows(str(path)) == rows


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1}\n{"a": \n', r"rows\.jsonl, line 2 is not JSON"),
        (b'\n\n{"a": 1}}\n', r"line 3 is not JSON"),
        (b"[1, 2]\n", r"line 1 is a list, expected an object"),
        (b'{"a": 1}\n7\n', r"line 2 is a int, expected an object"),
        (b"", r"has no rows"),
        (b"\n  \n", r"has no rows"),
        (b'{"a": "caf\xe9"}\n', r"rows\.jsonl"),
    ],
    ids=["cut", "surplus brace", "list", "number", "empty", "blank", "latin-1"],
)
def test_bad_rows_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(str(path))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl does not exist"):
        read_rows(str(tmp_path / "none.jsonl"))


def test_pairs_of_a_file_go_round(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "response": 1}\n{"prompt": "b", "response": "2"}\n')
    pairs = PairsFile(str(path))
    assert list(islice(pairs, 5)) == [("a", "1"), ("b", "2"), ("a", "1"), ("b", "2"), ("a", "1")]
    assert next(iter(pairs)) == ("a", "1")
    with pytest.raises(InputError, match=r"data\.response_field: got 'answer'.*prompt, response"):
        next(iter(PairsFile(str(path), response_field="answer")))


# ---- batch ------------------------------------------------------------------------------------------------------------


def rollout(index: int, prompt: tuple[int, ...], tokens: tuple[int, ...], correct: bool, finish: str = "stop") -> Rollout:
    logprobs = tuple(-0.1 * (index + 1) - 0.01 * position for position in range(len(tokens)))
    verdict = Verdict(float(correct), correct, "graded")
    return Rollout("p", index, 0, prompt, tokens, logprobs, finish, "", 0, verdict=verdict)


ROWS = (
    rollout(0, (11, 12), (1, 2, 9), True),
    rollout(1, (11, 12), (3, 4, 5, 6), False, "length"),
    rollout(2, (13,), (7, 9), True),
    rollout(3, (13,), (9,), False),
)
DATA = StepData(prompts=tuple(PROMPTS[:2]), rollouts=ROWS, greedy=(ROWS[1], ROWS[2]))


def test_pad_rows() -> None:
    batch = pad_rows([((11, 12), (1, 2, 9)), ((13,), ()), ((14,), (5,))], pad_token_id=0)
    assert batch.tokens.tolist() == [[11, 12, 1, 2, 9], [13, 0, 0, 0, 0], [14, 5, 0, 0, 0]]
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert batch.rewards.tolist() == [0, 0, 0] and batch.groups.tolist() == [0, 0, 0]


def test_make_batch() -> None:
    batch = make_batch(DATA, SamplingPlan(), Sampling(max_new_tokens=4), pad_token_id=0)
    assert batch.tokens.tolist() == [[11, 12, 1, 2, 9, 0], [11, 12, 3, 4, 5, 6], [13, 7, 9, 0, 0, 0], [13, 9, 0, 0, 0, 0]]
    mask = [[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert batch.response_mask.int().tolist() == mask
    assert batch.groups.tolist() == [0, 0, 1, 1]
    assert batch.rewards.tolist() == [1, 0, 1, 0]
    assert batch.correct.tolist() == [True, False, True, False]
    assert batch.truncated.tolist() == [False, True, False, False]
    wanted = [
        [0, 0, -0.1, -0.11, -0.12, 0],
        [0, 0, -0.2, -0.21, -0.22, -0.23],
        [0, -0.3, -0.31, 0, 0, 0],
        [0, -0.4, 0, 0, 0, 0],
    ]
    torch.testing.assert_close(batch.rollout_logprobs, torch.tensor(wanted, dtype=torch.float32))
    assert batch.greedy_rewards.tolist() == [0, 0, 1, 1]  # of each prompt's greedy response, for all its rows
    assert batch.old_logprobs is None and batch.ref_logprobs is None


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_overlong_penalty_goes_into_the_rewards(factor: float) -> None:
    """Limit 4, buffer 3: lengths 3, 4, 2 and 1 are 2/3, 1, 1/3 and nothing of the way through it."""
    plan = SamplingPlan(overlong_buffer_tokens=3, overlong_penalty_factor=factor)
    batch = make_batch(DATA, plan, Sampling(max_new_tokens=4), pad_token_id=0)
    assert batch.rewards.tolist() == pytest.approx([1 - factor * 2 / 3, -factor, 1 - factor / 3, 0], abs=1e-6)
    assert batch.correct.tolist() == [True, False, True, False]


def test_select_and_trim() -> None:
    batch = make_batch(DATA, SamplingPlan(), Sampling(), pad_token_id=0)
    part = batch.select(torch.tensor([3, 0, 3]))
    assert part.tokens.tolist() == [[13, 9, 0, 0, 0, 0], [11, 12, 1, 2, 9, 0], [13, 9, 0, 0, 0, 0]]
    assert part.groups.tolist() == [1, 0, 1] and part.greedy_rewards.tolist() == [1, 0, 1] and part.old_logprobs is None
    assert part.trim().tokens.tolist() == [[13, 9, 0, 0, 0], [11, 12, 1, 2, 9], [13, 9, 0, 0, 0]]
    short = batch.select(torch.tensor([2, 3])).trim()
    assert short.tokens.tolist() == [[13, 7, 9], [13, 9, 0]]
    assert short.response_mask.tolist() == [[False, True, True], [False, True, False]]
    assert short.rewards.tolist() == [1, 0]
    torch.testing.assert_close(short.rollout_logprobs, torch.tensor([[0, -0.3, -0.31], [0, -0.4, 0]]))


def test_trim_keeps_two_columns_when_no_row_has_a_token() -> None:
    assert pad_rows([((11, 12), ()), ((13,), ())], 0).trim().tokens.tolist() == [[11, 12], [13, 0]]


# ---- minibatches and micro-batches ------------------------------------------------------------------------------------

GROUPS = torch.tensor([5, -1, 5, 8, 8, -1, 2, 2])


def test_one_epoch_goes_through_the_prompts_in_order() -> None:
    assert [rows.tolist() for rows in minibatches(GROUPS, 2, 1, seed=0)] == [[1, 5, 6, 7], [0, 2, 3, 4]]
    assert [rows.tolist() for rows in minibatches(GROUPS, 4, 1, seed=0)] == [list(range(8))]


def test_several_epochs_shuffle_the_prompts_and_cut_no_group() -> None:
    parts = [rows.tolist() for rows in minibatches(GROUPS, 2, 6, seed=1)]
    assert len(parts) == 12
    for epoch in range(6):
        first, second = parts[2 * epoch : 2 * epoch + 2]
        assert sorted(first + second) == list(range(8))
        assert not {int(GROUPS[row]) for row in first} & {int(GROUPS[row]) for row in second}
    assert len({tuple(part) for part in parts}) > 2
    assert [rows.tolist() for rows in minibatches(GROUPS, 2, 6, seed=1)] == parts
    assert [rows.tolist() for rows in minibatches(GROUPS, 2, 6, seed=2)] != parts


LENGTHS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=12)  # of prompt and response


def ragged(lengths: list[tuple[int, int]]) -> Batch:
    return pad_rows([((1,) * prompt, tuple(range(2, response + 2))) for prompt, response in lengths], 0)


class RankOf:
    """Stands for one of several processes; sums are left to the test."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 80), ranks=st.integers(1, 5), packing=st.booleans(), data=st.data())
def test_micro_batches_partition_the_rows_within_the_budget(
    lengths: list[tuple[int, int]], budget: int, ranks: int, packing: bool, data: st.DataObject
) -> None:
    """Over all ranks every row once, as many parts on each rank as on the others, and none above the budget but single rows."""
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True, min_size=1))
    batch = ragged(lengths)
    shares = [list(MicroBatcher(RankOf(r, ranks), budget, packing).parts(batch, torch.tensor(chosen))) for r in range(ranks)]  # type: ignore[arg-type]
    assert len({len(share) for share in shares}) == 1
    real = [(rows, part) for share in shares for rows, part in share if part.response_mask.any()]
    assert sorted(row for rows, _ in real for row in rows.tolist()) == sorted(chosen)
    for rows, part in real:
        wanted = batch.select(rows).trim()
        assert torch.equal(part.tokens, wanted.tokens) and torch.equal(part.response_mask, wanted.response_mask)
        used = (part.response_mask * torch.arange(1, part.tokens.shape[1] + 1)).amax(1)
        assert len(rows) == 1 or (int(used.sum()) if packing else part.tokens.numel()) <= budget
    if budget >= len(chosen) * batch.tokens.shape[1]:
        assert len(shares[0]) == 1


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 80))
def test_scores_of_micro_batches_land_on_their_rows(lengths: list[tuple[int, int]], budget: int) -> None:
    batch = ragged(lengths)
    wide, narrow = MicroBatcher(RankOf(0, 1), budget).score(  # type: ignore[arg-type]
        batch, lambda part: (torch.where(part.response_mask, part.tokens * 10, 0), part.response_mask.sum(1))
    )
    assert torch.equal(wide, torch.where(batch.response_mask, batch.tokens * 10, 0))
    assert narrow.tolist() == [response for _, response in lengths]


def test_shares_of_the_ranks_add_up_to_the_scores_of_one() -> None:
    """Two rows on four ranks: the last two have none and add zeros."""
    batch = ragged([(1, 3), (2, 5)])

    def shares_of(ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            MicroBatcher(RankOf(rank, ranks), 80).score(  # type: ignore[arg-type]
                batch, lambda part: (part.response_mask * part.tokens, part.response_mask.sum(1))
            )
            for rank in range(ranks)
        ]

    (alone,) = shares_of(1)
    shares = shares_of(4)
    for place in (0, 1):
        assert torch.equal(sum(share[place] for share in shares), alone[place])
        assert not bool(shares[3][place].any())


def test_means_count_each_token_once() -> None:
    means = TokenMeans()
    means.add("x", torch.tensor([[1.0, torch.nan]]), torch.tensor([[True, False]]))
    means.add("x", torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[True, True, True]]))
    means.add("empty", torch.tensor([[torch.nan]]), torch.tensor([[False]]))
    assert means.means(BACKEND) == {"x": 2.5, "empty": 0.0}
