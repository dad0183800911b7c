"""The bench measures what it says: providers compute their loss, wrong ones are caught."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from sparse_ce import reference

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import continuous, linear, plif, problems, providers, race, run  # noqa: E402
from bench.problems import SUITES, Problem  # noqa: E402
from bench.race import DTYPES, Entrant  # noqa: E402

CPU = torch.device("cpu")
TINY = Problem(rows=12, classes=50, k=5)


@pytest.fixture(autouse=True)
def threads():
    """A run sets them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def by_reference(case: problems.Case, k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = case.logits.double().requires_grad_()
    loss = reference.sparse_ce(leaf, case.target, k)
    loss.backward()
    return loss.detach(), leaf.grad


def adaptive_by_reference(case: problems.Case) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = case.logits.double().requires_grad_()
    dropped = ~reference.adaptive_kept(leaf, case.target, problems.DELTA)
    z_y = leaf.gather(-1, case.target.unsqueeze(-1)).squeeze(-1)
    loss = (leaf.masked_fill(dropped, -torch.inf).logsumexp(-1) - z_y).mean()
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.fixture(params=providers.PROVIDERS, ids=lambda provider: provider.name)
def provider(request: pytest.FixtureRequest) -> providers.Provider:
    reason = request.param.unavailable(CPU, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def test_provider_computes_the_loss_that_its_row_names(provider, monkeypatch):
    # the graph is traced and differentiated as for the default compiler, without its C++ build
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case = TINY.fill(CPU, torch.float32, "normal")
    leaf = case.logits.clone().requires_grad_()
    loss = provider.make(leaf, case.target, case.k)()
    loss.backward()
    if provider.loss == "adaptive":
        wanted, gradient = adaptive_by_reference(case)
    else:
        wanted, gradient = by_reference(case, case.k if provider.loss == "top-k" else None)
    # a few roundings of float32, of terms below 8; the gradient has a twelfth of such a share
    tolerance = 4 * 8 * 2**-24
    torch.testing.assert_close(loss.double(), wanted, rtol=0, atol=tolerance)
    found = leaf.grad.double()
    if provider.loss == "tail":
        onehot = torch.nn.functional.one_hot(case.target, TINY.classes) / TINY.rows
        arguments = (found + onehot, gradient + onehot, case.logits, case.target, case.k)
        found = run.with_whole_tail(*arguments) - onehot
    torch.testing.assert_close(found, gradient, rtol=0, atol=tolerance / TINY.rows)


@pytest.mark.parametrize("data", problems.DATA)
@pytest.mark.parametrize("k", [1, 5, 50])
def test_the_answers_that_providers_are_checked_against(data, k):
    problem = Problem(TINY.rows, TINY.classes, k)
    case = problem.fill(CPU, torch.bfloat16, data)
    loss, gradient = by_reference(case, k)
    assert case.truth["top-k"] == pytest.approx(loss.item(), rel=1e-12)
    assert case.truth["dense"] == pytest.approx(by_reference(case, None)[0].item(), rel=1e-12)
    loss, gradient_adaptive = adaptive_by_reference(case)
    assert case.truth["adaptive"] == pytest.approx(loss.item(), rel=1e-12)
    onehot = torch.nn.functional.one_hot(case.target, TINY.classes)
    p, tied = problems.adaptive_probabilities(case.logits, case.target)
    assert not tied.any()
    wanted = gradient_adaptive * TINY.rows + onehot
    torch.testing.assert_close(p, wanted, rtol=0, atol=1e-14)
    p, tied = problems.probabilities(case.logits, k)
    wanted = gradient * TINY.rows + onehot
    assert torch.equal(tied, case.logits == case.logits.sort(-1).values[:, -k, None])
    torch.testing.assert_close(p[~tied], wanted[~tied], rtol=0, atol=1e-14)
    # of the tied the reference keeps the first: what they hold together is the same
    torch.testing.assert_close((p * tied).sum(-1), (wanted * tied).sum(-1), rtol=0, atol=1e-14)


def broken(change):
    """The right composition, but for what `change` does to its logits and k."""

    def make(logits, target, k):
        return lambda: providers._loss(*change(logits, target, k))

    return make


def shifted_gradient(logits, target, k):
    """The right value, the gradient of the neighbouring class."""
    off = logits.roll(1, -1)
    return logits.detach() + (off - off.detach()), target, k


BROKEN = {
    "loss": broken(lambda logits, target, k: (logits, target, k - 1)),
    "gradient": broken(shifted_gradient),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", BROKEN)
def test_what_is_wrong_is_found_in_every_dtype(part, dtype):
    case = TINY.fill(CPU, DTYPES[dtype], "normal")
    provider = providers.Provider("broken", BROKEN[part])
    enter = functools.partial(run.enter, provider, case)
    found = race.admit(Entrant(provider.name), CPU, None, enter)
    assert found.status == "wrong" and found.reason.startswith(part)
    assert found.errors["gradient"] > 1
    assert (found.errors["loss"] > 1) == (part == "loss")


def test_the_exit_status_tells_wrong_from_missing(monkeypatch, capsys):
    def raising(logits, target, k):
        raise RuntimeError("no compiler\nat all")

    def status(*rows):
        monkeypatch.setattr(run, "PROVIDERS", rows)
        return run.main(
            ["--shape", "8", "40", "4", "--repeats", "2", "--dtype", "fp32", "--device", "cpu"]
        )

    right = providers.Provider("right", broken(lambda *arguments: arguments))
    assert status(right, providers.Provider("rival", raising)) == 0
    assert "error: RuntimeError: no compiler\n" in capsys.readouterr().out
    assert status(right, providers.Provider("own", raising, ours=True)) == 1
    assert status(right, providers.Provider("rival", BROKEN["gradient"])) == 1


def test_suites():
    names = {row.name for row in providers.PROVIDERS}
    assert len(names) == len(providers.PROVIDERS)
    assert set(SUITES["floor"].problems) <= set(SUITES["full"].problems)
    for suite in SUITES.values():
        assert suite.problems and len(set(suite.problems)) == len(suite.problems)
        assert set(suite.skip) <= names
        for problem in suite.problems:
            assert 1 <= problem.k < problem.classes
            assert problem.on(CPU, torch.bfloat16) == problem
            on_gpu = problem.on(torch.device("cuda"), torch.bfloat16)
            assert (on_gpu.rows * on_gpu.classes * 2 >= 2e9) == problem.grow


def test_peak_memory_counts_what_is_held_at_a_time():
    def work():
        first = torch.ones(1000, dtype=torch.float64)
        second = first + 1
        del first
        return second * 2

    # the third is allocated after the first is freed
    assert race.peak_memory(CPU, work) == pytest.approx(2 * 8000, abs=256)


def test_ratios_pair_the_rounds():
    """Drift that hits both alike leaves no trace; rounds that one sat out do not count."""
    own, rival = Entrant("own"), Entrant("rival")
    own.samples["backward"] = [1.0, 10.0, 3.0, 999.0]
    rival.samples["backward"] = [2.0, 20.0, 6.0]
    assert race.ratio(own, rival)["backward"] == {"median": 2.0, "p20": 2.0, "p80": 2.0}


def test_who_takes_turns():
    """As many rounds as are asked for; after its seconds a slow one sits out; no one wrong."""
    milliseconds = {"quick": 1.0, "slow": 1500.0, "wrong": 1.0}
    quick, slow, wrong = (Entrant(name, passes={"step": lambda n=name: n}) for name in milliseconds)
    wrong.status = "wrong"
    rounds = []

    def clock(name):
        return race.Time(milliseconds[name], host_ms=0.5)

    racing = race.take_turns(
        (quick, slow, wrong), clock, 6, seconds=5, between=lambda: rounds.append(1)
    )
    assert racing == [quick, slow] and len(rounds) == 6
    assert [len(entrant.samples["step"]) for entrant in racing] == [6, 4]
    assert quick.host == {"step": [0.5] * 6}
    assert not wrong.samples


def test_a_run_writes_results_and_a_picture(tmp_path):
    path = tmp_path / "results" / "tiny.json"
    options = "--shape 64 300 4 --repeats 3 --data ties --device cpu --provider eager cross_entropy"
    assert run.main([*options.split(), "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    about = written["environment"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["device"] == "cpu" and about["threads"] == torch.get_num_threads() == 2
    assert about.keys() >= {"cpu", "instruction_sets", "load_average", "commit", "python"}
    assert about["used"]["torch"] == torch.backends.cpu.get_cpu_capability()
    for result, dtype in zip(written["results"], (torch.bfloat16, torch.float32), strict=True):
        shape = {"rows": 64, "classes": 300, "k": 4, "grow": True}
        assert result["problem"] == {**shape, "dtype": str(dtype)[6:], "data": "ties"}
        rates, nbytes = result["bandwidth_GBps"], 64 * 300 * dtype.itemsize
        assert rates.keys() == {"read", "write", "fresh"} and min(rates.values()) > 0
        ours, dense = result["providers"]
        assert (ours["loss"], dense["loss"]) == ("top-k", "dense")
        for found in (ours, dense):
            assert found["status"] == "ok" and max(found["errors_in_tolerances"].values()) <= 1
            for name, (reads, writes) in run.MOVES.items():
                times = found["passes"][name]
                assert times["p20_ms"] <= times["median_ms"] <= times["p80_ms"]
                assert len(times["samples_ms"]) == 3
                rate = (reads + writes) * nbytes / times["median_ms"] / 1e6
                assert times["GBps"] == pytest.approx(rate)
                floor = (reads / rates["read"] + writes / rates["write"]) * nbytes / 1e6
                share = 100 * floor / times["median_ms"]
                assert times["percent_of_bandwidth"] == pytest.approx(share)
            assert found["passes"]["forward+backward"]["peak_bytes"] >= nbytes
        assert result["ratios"].keys() == {"sparse_ce.eager"}
        assert result["ratios"]["sparse_ce.eager"].keys() == {"cross_entropy"}

    pytest.importorskip("matplotlib")
    from bench import plot

    plot.main([str(path)])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="expected times of sparse_ce.cpu"):
        plot.main([str(path), "--provider", "sparse_ce.cpu"])


def test_plif_is_checked_and_timed(tmp_path, capsys):
    path = tmp_path / "plif.json"
    options = "--shape 32 300 4 50 --repeats 3 --dtype fp32 bf16 --device cpu"
    assert plif.main([*options.split(), "--json", str(path)]) == 0
    for result in json.loads(path.read_text())["results"]:
        found = {row["provider"]: row for row in result["providers"]}
        assert found.keys() == plif.PROVIDERS.keys()
        assert all(row["status"] == "ok" for row in found.values())
        pairs = {(a, b) for a, rivals in result["ratios"].items() for b in rivals}
        assert pairs == set(plif.RATIOS)
        # what is saved: some numbers per row and per cell, not per logit
        assert found["dense.plif"]["saved_bytes"] <= 32 * 17 + 50 * 16 + 64
        assert found["dense.composition"]["saved_bytes"] >= 32 * 300 * 8


def test_a_wrong_plif_is_not_timed(monkeypatch, capsys):
    def shifted(logits, target, k, link):
        return plif._topk_by_index(logits, target, k + 1, link)

    rows = {"topk.plif": (shifted, True, plif._topk_by_index)}
    monkeypatch.setattr(plif, "PROVIDERS", plif.PROVIDERS | rows)
    options = "--shape 32 300 4 50 --repeats 2 --dtype fp32 --device cpu --provider topk.plif"
    assert plif.main(options.split()) == 1
    assert "topk.plif: wrong: loss" in capsys.readouterr().err


def test_an_output_layer_is_checked_and_timed(tmp_path, capsys):
    path = tmp_path / "linear.json"
    options = "--shape 40 16 300 4 --repeats 3 --device cpu --dtype fp32 bf16 --provider eager"
    rivals = "linear+composition linear+cross_entropy linear_cross_entropy chunked chunks_of_256"
    assert linear.main([*options.split(), *rivals.split(), "--json", str(path)]) == 0
    for result in json.loads(path.read_text())["results"]:
        ours, *others = result["providers"]
        assert ours["provider"] == "sparse_ce.eager" and len(others) == 5
        assert result["product_ms"]["median"] > 0
        if not hasattr(torch.nn.functional, "linear_cross_entropy"):  # torch 2.11
            absent, others = others[2:], others[:2]
            assert all(row["status"] == "unavailable" for row in absent)
        for row in (ours, *others):
            assert row["status"] == "ok" and max(row["errors_in_tolerances"].values()) <= 1
            assert all(len(found["samples_ms"]) == 3 for found in row["passes"].values())
        assert result["ratios"]["sparse_ce.eager"].keys() == {row["provider"] for row in others}


def test_a_wrong_output_layer_is_not_timed(monkeypatch, capsys):
    def make(hidden, weight, target, k):
        # the gradient of weight is another
        return linear._plain_topk(hidden, weight + weight.detach(), target, k)

    monkeypatch.setattr(linear, "PROVIDERS", (linear.Provider("broken", make),))
    options = "--shape 40 16 300 4 --repeats 2 --device cpu --dtype fp32"
    assert linear.main(options.split()) == 1
    assert "broken: wrong: " in capsys.readouterr().err


def test_break_even_times_both_ways(tmp_path, capsys):
    path = tmp_path / "break-even.json"
    options = "--break-even --shape 20 8 400 20 --repeats 2 --device cpu --dtype fp32"
    assert linear.main([*options.split(), "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert [row["k"] for row in result["rows"]] == [1, 2, 6, 12, 26, 49, 99]
    assert all(min(row["sparse"], row["dense"]) > 0 for row in result["rows"])


def test_continuous_outputs_are_checked_and_weighed(tmp_path, capsys):
    path = tmp_path / "tiny.json"
    options = "--shape 300 16 2000 8 --device cpu --repeats 2 --provider eager chunked"
    assert continuous.main([*options.split(), "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    ours, softmax = result["providers"]
    assert (ours["provider"], softmax["provider"]) == ("sparse_ce.eager", "cross_entropy.chunked")
    peaks = [row["passes"]["step"]["peak_bytes"] for row in (ours, softmax)]
    assert all(len(row["passes"]["step"]["samples_ms"]) == 2 for row in (ours, softmax))
    # neither table nor number of words; the logits of a chunk, and the gradient of a large weight
    assert peaks[0] == pytest.approx(ours["peak_bytes_of_a_tenth"], rel=0.02)
    assert peaks[1] > 4 * 256 * 2000 + 4 * 16 * 2000
    assert "cross_entropy.chunked / sparse_ce.eager: step" in capsys.readouterr().out


def test_the_softmaxes_beside_continuous_outputs_agree():
    case = continuous.Case.of(continuous.Problem(300, 16, 500, 8), CPU)
    whole, chunked = (
        continuous.PROVIDERS[name](case) for name in ("cross_entropy", "cross_entropy.chunked")
    )
    torch.manual_seed(0)
    assert whole().item() == pytest.approx(6.3, abs=0.3)  # about log 500: layers start apart
    assert chunked().item() == pytest.approx(6.3, abs=0.3)


def test_a_softmax_that_does_not_fit_is_left_out():
    problem = continuous.Problem(tokens=10**9)
    assert "GB are free" in continuous.missing("cross_entropy", problem, CPU)
