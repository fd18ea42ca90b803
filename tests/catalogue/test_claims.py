import json
import math
import re

import numpy as np
import pytest
import torch

import loratory as lt
from loratory.catalogue import check as checking
from loratory.catalogue.claim import CLAIMS, Bounds, Claim, read_claim, read_claims
from loratory.catalogue.counts import COUNTS
from loratory.catalogue.digits import (
    DIGITS,
    Learned,
    Task,
    at_best_rate,
    digits,
    fused_digits,
    learned,
    pretrained,
    trained_layer,
    turned,
    turned_digits,
)
from loratory.catalogue.ledger import RESULTS, is_current, read_result
from loratory.catalogue.properties import PROPERTIES, gradient_norm_ratio, learn, merged_work
from loratory.catalogue.structure import STRUCTURE, approximation, rank_of_change, saved_bytes, target_weights
from loratory.catalogue.timing import TIMING
from loratory.catalogue.versus import MEASURES, folder, measured, settings_of
from loratory.cli import main
from loratory.compare.settings import read_compare
from loratory.methods.registry import METHODS, method_class
from tests.compare.made import made

ALL = read_claims()
SOON = ("gpt-3", "roberta-base", "gpt2-medium", "gpt2-medium-apart")  # models that are counted in a second


def a_claim(**changes):
    values = {
        "name": "x",
        "paper": "2106.09685",
        "method": "lora",
        "claim": "c",
        "setting": "s",
        "stated": 1.0,
        "unit": "u",
        "kind": "count",
    }
    return Claim(**(values | {"run": {"function": "trained"}, "holds": Bounds(least=1, most=2)} | changes))


@pytest.mark.parametrize("claim", ALL.values(), ids=lambda c: c.name)
def test_every_claim_is_one_that_can_be_run(claim):
    assert claim.method in METHODS
    assert re.fullmatch(r"\d{4}\.\d{5}", claim.paper)
    if claim.kind == "count":
        assert claim.run["function"] in COUNTS
    elif claim.kind == "property":
        assert claim.run["function"] in checking.functions_of("property")
    elif claim.kind == "digits":
        assert claim.run["function"] in DIGITS
        task = Task(**{field: claim.run[field] for field in vars(Task()) if field in claim.run})
        assert task.seeds >= 3
        for side in ("first", "second"):
            for arm in claim.run[side] if isinstance(claim.run[side], list) else [claim.run[side]]:
                assert len(arm["rates"]) >= 3
                method_class(arm["method"])(**arm.get("options", {}))
    elif claim.kind == "compare":
        settings = read_compare(settings_of(claim.name, claim.run, CLAIMS))
        assert claim.run["measure"] in MEASURES
        assert len(settings.all_seeds()) >= 3
        for arm in settings.arms():
            assert len(arm.rates) >= 3, arm.label
        assert {*claim.run["first"], *claim.run["second"]} == {arm.label for arm in settings.arms()}
    else:
        assert claim.reason


@pytest.mark.parametrize("claim", [c for c in ALL.values() if c.differs], ids=lambda c: c.name)
def test_no_number_both_holds_and_differs(claim):
    """A limit itself may be shared; holds is asked first there."""
    holds, differs = claim.holds, claim.differs
    if holds.most is not None and holds.least is None:
        assert differs.most is None
        assert differs.least >= holds.most
    else:
        assert holds.most is None
        assert differs.least is None
        assert differs.most <= holds.least


def test_claims_that_share_their_runs_ask_for_the_same_ones(tmp_path):
    shared: dict[str, list[Claim]] = {}
    for claim in ALL.values():
        if "runs" in claim.run:
            shared.setdefault(claim.run["runs"], []).append(claim)
    for name, together in shared.items():
        assert {folder(c.name, c.run, tmp_path) for c in together} == {tmp_path / name}
        assert (
            len(
                {
                    json.dumps({k: v for k, v in c.run["keys"].items() if k not in ("methods", "baseline")})
                    for c in together
                }
            )
            == 1
        )
        arms: dict[str, object] = {}
        for claim in together:
            for label, arm in claim.run["keys"]["methods"].items():
                assert arms.setdefault(label, arm) == arm
    assert folder("alone", {}, tmp_path) == tmp_path / "alone"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda f: f.stem)
def test_every_stored_result_is_of_the_claim_as_it_stands_and_follows_its_rule(file):
    claim = ALL[file.stem]
    result = read_result(claim, [RESULTS])
    assert is_current(claim, result)
    assert result["verdict"] == claim.verdict(result)
    assert (result["stated"], result["rule"]) == (claim.stated, claim.rule)
    assert {"versions", "date", "command"} <= result.keys()


@pytest.mark.parametrize("name", [c.name for c in ALL.values() if c.kind == "count" and c.run.get("model") in SOON])
def test_counts_give_what_is_stored(name):
    claim = ALL[name]
    found = COUNTS[claim.run["function"]](**{k: v for k, v in claim.run.items() if k != "function"})
    assert found["value"] == read_result(claim, [RESULTS])["value"]


@pytest.mark.parametrize(
    "name",
    ["dora-start", "dora-row-lengths", "rslora-scale", "lora-no-latency", "lamda-peak-memory", "nola-basis-not-kept"],
)
def test_properties_keep_their_stored_verdict(name):
    claim = ALL[name]
    found = PROPERTIES[claim.run["function"]](**{k: v for k, v in claim.run.items() if k != "function"})
    assert claim.verdict(found) == read_result(claim, [RESULTS])["verdict"]


def test_an_unmerged_adapter_costs_work_so_that_the_merged_ratio_means_something():
    found = merged_work(method="lora", options={"rank": 8})
    assert found["value"] == 1.0
    assert found["unmerged"] > 1.05


def test_the_first_gradient_has_the_norm_that_the_scale_gives():
    setting = {"alpha": 8, "width": 32, "tokens": 64, "steps": 0, "rate": 0.1, "seed": 0}
    for rank in (1, 4, 16):
        plain, ours = (learn(rank, rslora=kind, **setting)[0] for kind in (False, True))
        assert ours / plain == pytest.approx(rank**0.5, rel=1e-4)


def test_a_small_gradient_experiment_tells_the_scales_apart():
    setting = {"low": 2, "high": 32, "alpha": 8, "width": 32, "tokens": 64, "steps": 3, "rate": 0.01, "seeds": 2}
    assert (
        gradient_norm_ratio(rslora=True, **setting)["value"] > 2 * gradient_norm_ratio(rslora=False, **setting)["value"]
    )


def test_memory_below_masked_tuning_is_counted_entry_by_entry():
    setting = {"model": "vit-base", "method": "snella", "options": {"rank": 32}, "where": "layers[.].*"}
    found = COUNTS["below_masked"](**setting)
    entries, points, largest = 12 * (4 * 768**2 + 2 * 768 * 3072), 5_308_416, 768 * 3072
    assert found["masked_bytes"] == 13 * entries
    assert found["adapter_bytes"] == 12 * (points + 216) + 8 * points + 4 * (2 * largest + 6 * 65536)
    assert found["value"] == pytest.approx(100 * (1 - found["adapter_bytes"] / found["masked_bytes"]))


def test_a_step_of_masked_tuning_holds_every_entry_and_ours_its_points():
    found = STRUCTURE["tuning_bytes"](method="snella", options={"rank": 8}, blocks=1, width=64, images=1)
    entries = 4 * 64 * 64 + 2 * 64 * 256
    assert found["gradients, states, mask of masked tuning"] == 13 * entries + 4 * 6
    points = 8 * (4 * 128 + 2 * 320)
    assert found["gradients, states, importance"] == 12 * (points + 18) + 8 * points + 4 * 5 * 6
    assert found["kept by masked tuning"] > 0 < found["kept for the backward pass"]


# -- verdicts ----------------------------------------------------------------------------------------------------------


def found(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def test_verdicts_follow_the_rule():
    assert [a_claim().verdict(found(v)) for v in (0.99, 1, 2, 2.01)] == ["differs", "holds", "holds", "differs"]
    three = a_claim(holds=Bounds(of="high", most=0), differs=Bounds(least=1))
    assert three.verdict(found(-1, -2, -0.1)) == "holds"
    assert three.verdict(found(-1, -2, 0.1)) == "not seen"
    assert three.verdict(found(1, -2, 4)) == "differs"
    assert three.verdict(found(-1)) == "not seen"  # without an interval nothing is claimed
    assert a_claim(kind="none", run={}, holds=None, reason="r").verdict(found(None)) == "not checkable here"


def test_a_result_of_another_wording_is_none_of_this_claim():
    claim = a_claim()
    result = {"claim": claim.digest, "verdict": "holds"}
    assert is_current(claim, result)
    for change in ({"holds": Bounds(least=1, most=3)}, {"claim": "d"}, {"stated": 2.0}, {"run": {"function": "share"}}):
        assert not is_current(a_claim(**change), result), change
    assert checking.row(a_claim(stated=2.0), result)["verdict"] == "claim changed since"


def test_a_compared_claim_is_first_minus_second_of_the_best_on_dev():
    comparison = made({"full": 0.9, "lora rank=1": 0.7, "lora rank=4": 0.85})
    run = {"measure": "difference", "first": ["full"], "second": ["lora rank=1", "lora rank=4"]}
    result = measured(comparison, run)
    assert (result["first"], result["second"]) == ("full", "lora rank=4")
    assert result["value"] == pytest.approx(result["mean of full"] - result["mean of lora rank=4"])
    assert result["low"] < result["value"] < result["high"]
    percent = measured(comparison, run | {"measure": "percent"})
    assert percent["value"] == pytest.approx(100 * result["value"] / result["mean of lora rank=4"])


def test_a_compared_claim_without_test_scores_says_so():
    run = {"measure": "difference", "first": ["full"], "second": ["lora"]}
    with pytest.raises(RuntimeError, match="full and lora have no test scores of a common seed"):
        measured(made({"lora": 0.8, "full": 0.9}, test=False), run)


# -- the command -------------------------------------------------------------------------------------------------------


def test_list_shows_all_with_verdicts(capsys):
    assert main(["claims"]) == 0
    text = capsys.readouterr().out
    for name in ALL:
        assert name in text
    assert f"{len(ALL)} claims: " in text
    assert main(["claims", "lora-gpt2-medium-trained"]) == 0
    assert "393,216 numbers" in capsys.readouterr().out


def test_json_and_python_give_the_same_rows(capsys):
    assert main(["claims", "--method", "dora", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == lt.claims(method="dora")
    assert {row["method"] for row in rows} == {"dora"}


@pytest.mark.parametrize(
    "words",
    [["dora-start", "dora-row-lengths"], ["dora-start,dora-row-lengths"], ["--names", "dora-start,dora-row-lengths"]],
)
def test_names_are_given_with_blanks_or_commas(words, capsys):
    assert main(["claims", *words, "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["dora-start", "dora-row-lengths"]


def test_run_writes_a_result_and_a_second_run_takes_it(tmp_path, capsys):
    words = ["claims", "run", "lora-roberta-base-trained", "--results", str(tmp_path)]
    assert main([*words, "--again"]) == 0
    assert "holds: 294,912 numbers, the paper 300,000" in capsys.readouterr().out
    stored = json.loads((tmp_path / "lora-roberta-base-trained.json").read_text())
    assert stored["command"] == "loratory claims run lora-roberta-base-trained --results " + str(tmp_path) + " --again"
    assert main(words) == 0
    assert "--again checks it again" in capsys.readouterr().out
    (tmp_path / "lora-roberta-base-trained.json").write_text("{")
    assert main(words) == 2
    assert "is no result of a claim (it is not JSON); delete it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dora-strat"], "there is no claim 'dora-strat'; nearest: dora-start"),
        (["--method", "lorra"], "there is no claim of method 'lorra'; there are claims of convlora, dora, lamda, loca"),
        (["--kind", "counts"], "kind is 'counts'; it must be count, property, digits, compare, none"),
        (
            ["--method", "dora", "dora-start", "--kind", "count"],
            "no claim is of all that was asked for: dora-start, dora, count",
        ),
        (["run"], "claims run does not know which to check; give names, --method, --kind, or --all"),
        (["--again"], "--again and --all check claims; write `loratory claims run`"),
        (["run", "dora-start", "--results", "FILE"], "is a file; name a folder"),
        (["dora-start", "--names", "lora-start"], "'dora-start' and --names both give names; use one of the two"),
    ],
)
def test_mistakes_get_one_message(words, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["claims", *(str(tmp_path / "file") if word == "FILE" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "claim 'x' holds list; it must be a table of fields"),
        ("a: [\n", "claim 'x' is no YAML"),
        ("paper: 1\nmethd: lora\n", "claim 'x' has the field 'methd', which there is not; nearest: method"),
        ("paper: 1\n", "claim 'x' has no field 'method'"),
        ("COMMON\nkind: counts\n", "claim 'x' is of kind 'counts'; it must be count, property, digits, compare, none"),
        ("COMMON\nkind: count\n", "claim 'x' of kind count has no run or no rule holds; it needs both"),
        ("COMMON\nkind: none\n", "claim 'x' is of kind none without a reason"),
        (
            "COMMON\nkind: count\nrun: {}\nholds: {of: middle, least: 1}\n",
            "claim 'x' has holds of 'middle'; it must be value, low, high",
        ),
        ("COMMON\nkind: count\nrun: {}\nholds: 3\n", "claim 'x' has holds 3; it must be least and most"),
        (
            "COMMON2\nkind: count\nrun: {}\nholds: {least: 3}\n",
            "claim 'x' has stated 'many'; it must be the paper's number",
        ),
    ],
)
def test_a_claim_that_is_none_is_named_with_what_is_wrong(text, message, tmp_path):
    common = "paper: '1'\nmethod: lora\nclaim: c\nsetting: s\nstated: {}\nunit: u"
    file = tmp_path / "x.yaml"
    file.write_text(text.replace("COMMON2", common.format("many")).replace("COMMON", common.format(1)))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_claim(file)


def test_a_function_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="claim 'x' runs 'traned', which there is not; there are trained"):
        checking.check(a_claim(run={"function": "traned"}), CLAIMS, print, "")


@pytest.mark.slow
def test_a_compared_claim_runs_goes_on_and_is_judged(tmp_path):
    lines = [json.dumps({"prompt": f"Say {i}.", "completion": f"It is {i}."}) for i in range(8)]
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    keys = {"base": "tests/models/stories260k", "task": "chat", "budget": "steps=2", "seeds": 2, "metric": "token_loss"}
    keys |= {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "dev", "test")}
    keys |= {
        "methods": {
            "lora": {"method": "lora", "rank": 2, "rates": [1e-3]},
            "dora": {"method": "dora", "rank": 2, "rates": [1e-3]},
        }
    }
    claim = a_claim(kind="compare", run={"keys": keys, "measure": "percent", "first": ["dora"], "second": ["lora"]})
    said = []
    first = checking.check(claim, tmp_path / "out", said.append, "")
    assert any("started" in line for line in said)
    said.clear()
    assert checking.check(claim, tmp_path / "out", said.append, "") == first
    assert not any("started" in line for line in said)
    assert first["low"] <= first["value"] <= first["high"]


# -- digits ------------------------------------------------------------------------------------------------------------

SMALL = {"width": 16, "blocks": 1, "samples": 50, "steps": 5, "seeds": 2}


def test_no_image_stands_in_two_parts():
    (upright, turned_ones) = digits()
    back = turned(0).x
    assert len(upright.y) + len(turned_ones.y) == 1797
    assert torch.equal(back.unflatten(1, (8, 8)).rot90(1, (1, 2)).flatten(1), turned_ones.x)
    assert not {tuple(x) for x in upright.x.tolist()} & {tuple(x) for x in back.tolist()}


def test_a_rate_at_the_edge_is_passed_until_it_is_inside_and_dev_alone_decides(monkeypatch):
    def scored(task, method, options, rate):
        dev = abs(math.log(rate / 0.1))
        return Learned(np.full((2, 3), dev), np.full((2, 3), -dev), np.ones((2, 3)), 7)

    monkeypatch.setattr("loratory.catalogue.digits.learned", scored)
    rate, _, tried = at_best_rate(Task(), {"method": "lora", "rates": [1e-3, 1e-2]})
    assert rate == pytest.approx(0.1)
    assert tried == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])


def test_a_method_against_itself_makes_no_difference_and_the_better_of_two_is_taken_on_dev():
    lora = {"method": "lora", "options": {"rank": 2}, "rates": [1e-3, 1e-2, 1e-1]}
    none = {"method": "lora", "options": {"rank": 1}, "rates": [1e-12, 1e-11, 1e-10]}
    same = turned_digits(first=[lora], second=[lora], measure="percent of loss", **SMALL)
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)
    both = turned_digits(first=[none, lora], second=[none], measure="points of accuracy", **SMALL)
    assert both["first"]["options"] == {"rank": 2}
    assert both["first"]["trained numbers"] == 2 * (16 + 16)
    assert both["value"] == pytest.approx(both["first"]["accuracy (%)"] - both["second"]["accuracy (%)"])
    assert both["images"] == 347


def test_methods_that_start_from_a_gradient_or_act_in_training_are_given_what_they_need():
    for arm in ({"method": "lora-sb", "options": {"rank": 4}}, {"method": "loca", "options": {"n_frequency": 9}}):
        found = learned(Task(**SMALL), arm["method"], json.dumps(arm["options"]), 0.1)
        assert found.test.shape == (2, 347)
        assert np.isfinite(found.test).all()


def test_fusing_loses_what_three_adapters_told_alone_and_not_together():
    lora = {"method": "lora", "options": {"rank": 2}, "rates": [1e-2, 3e-2, 1e-1]}
    found = fused_digits(first=lora, second=lora, **SMALL)
    assert found["value"] == 0
    assert found["first"] == found["second"]


def test_a_result_does_not_depend_on_the_number_of_threads():
    lora = {"method": "lora", "options": {"rank": 4}, "rates": [1e-2, 3e-2, 1e-1]}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for cached in (learned, pretrained):
                cached.cache_clear()
            found.append(turned_digits(first=[lora], second=[lora], measure="percent of loss", seeds=1, steps=20))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_too_many_images_are_refused():
    with pytest.raises(ValueError, match="samples is 301; it must lie between 50 and 300"):
        Task(samples=301)
    with pytest.raises(ValueError, match="measure is 'loss'; it must be percent of loss, points of accuracy"):
        turned_digits(first=[], second=[], measure="loss")


# -- structure ---------------------------------------------------------------------------------------------------------


def test_the_rank_of_a_lora_is_its_rank():
    found = rank_of_change(method="lora", options={"rank": 3}, inputs=16, outputs=12, seeds=2)
    assert (found["value"], found["largest"], found["trained"]) == (3, 3, 3 * 28)


def test_an_update_within_reach_is_met_and_one_beyond_stays_at_its_floor():
    side = {"method": "lora", "options": {"rank": 2}, "rates": [1e-2, 3e-2, 1e-1]}
    setting = {"size": 16, "first": side, "second": {"floor": 2}, "steps": 300, "seeds": 1}
    assert approximation(target="full rank", **setting)["value"] == pytest.approx(1, abs=0.01)
    assert approximation(target="low rank", rank=2, **setting | {"second": side})["error of the first"] < 0.01


def test_what_a_layer_saves_is_counted():
    lora = {"method": "lora", "options": {"rank": 4}}
    found = saved_bytes(first=lora, second=lora, width=32, tokens=8)
    assert (found["value"], found["first"]) == (1, 4 * 8 * (32 + 4))


def test_a_smooth_update_lies_in_few_directions_and_shuffling_hides_it_from_the_low_band():
    W, low = torch.eye(32), (torch.eye(32)[::2] + torch.eye(32)[1::2]) / 2**0.5
    smooth, shuffled = (
        target_weights(kind, W, 0, torch.Generator().manual_seed(3)) - W for kind in ("smooth", "shuffled")
    )
    torch.testing.assert_close(torch.linalg.svdvals(smooth), torch.linalg.svdvals(shuffled))
    assert smooth.norm() == pytest.approx(float(W.norm()), rel=1e-4)
    assert (low @ smooth @ low.T).norm() > 0.9 * smooth.norm()
    assert (low @ shuffled @ low.T).norm() < 0.7 * shuffled.norm()


def test_a_method_against_itself_takes_the_same_bytes():
    lora = {"method": "lora", "options": {"rank": 4}}
    same = STRUCTURE["training_bytes"](first=lora, second=lora, width=32, inner=48, tokens=4)
    assert same["value"] == 0
    numbers = 2 * 4 * (4 * 2 * 32 + 3 * (32 + 48))
    assert same["adapter of the first"] >= 4 * numbers
    assert (
        same["gradients, states of the first"] == 12 * numbers + 4 * 28
    )  # and a count of steps for each of the factors


def test_updates_at_the_same_places_disturb_each_other_on_the_diagonal_more():
    found = STRUCTURE["mask_orthogonality"](width=64, fraction=0.05, seeds=1)
    assert found["AWOR of places apart"] == pytest.approx((1 - 0.05**2) ** 64, abs=0.02)
    assert found["AWOM of places apart"] < found["AWOM of the same places"]
    assert 0.1 < found["value"] < 0.3


def test_all_coefficients_hold_all_energy_in_both_transforms():
    assert STRUCTURE["cosine_over_fourier"](size=16, rank=8, seeds=1)["value"] == pytest.approx(1, abs=1e-9)


def test_a_layer_trained_in_full_has_moved():
    before, after = trained_layer(0)
    assert before.shape == (256, 256)
    assert 0.1 < float((after - before).norm() / before.norm()) < 1


@pytest.mark.parametrize(
    ("function", "setting"),
    [
        ("step_time", {"first": {"method": "loca"}, "second": {"method": "lora"}, "size": 32, "tokens": 4}),
        ("transform_time", {"sizes": [8, 16]}),
        ("operation_time", {"width": 64, "fraction": 0.01, "rank": 2}),
        ("switch_time", {"widths": [[32, 64], [64, 32]], "layers": 1, "fraction": 0.05, "rank": 2}),
    ],
)
def test_times_are_ratios_of_rounds(function, setting):
    found = TIMING[function](rounds=2, **setting)
    if function != "transform_time":
        assert found["least"] <= found["value"] <= found["most"]
    assert found["value"] > 0


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="target is 'x'; it must be full rank, low rank, kronecker, smooth, shuffled"):
        target_weights("x", torch.eye(8), 1, torch.Generator())
    with pytest.raises(ValueError, match="inputs is 9; a kronecker target needs a cube"):
        target_weights("kronecker", torch.eye(9), 1, torch.Generator())
