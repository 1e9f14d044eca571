"""``verify`` accepts the recorded values with every memory setting, and rejects anything that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from repbend_fast.config.schema import MemoryConfig
from repbend_fast.console import saying
from repbend_fast.errors import UserError
from repbend_fast.verify import GRADIENT_TOLERANCE, LOSS_TOLERANCE, Check, Verification, run_verify, verify_folder
from repbend_fast.verify.golden import load_batch

GOLDEN = Path(__file__).parents[1] / "golden"
CASES, STEPS = 30, 10
COMBINED = "b0.request_last.all.default"
MEMORY = {
    "padded": {"packing": "off"},
    "split padded": {"packing": "off", "piece_tokens": 40},
    "split packed, checkpoint 2, small chunks": {
        "packing": "on",
        "piece_tokens": 40,
        "checkpoint_blocks": 2,
        "kl_chunk_rows": 3,
    },
    "one by one, checkpoint all": {"packing": "off", "piece_tokens": 1, "checkpoint_blocks": "all", "kl_chunk_rows": 1},
}


def _failed(verification: Verification) -> list[str]:
    return [c.key for c in verification.checks if not c.passed]


def test_every_recorded_value() -> None:
    verification = verify_folder(GOLDEN / "repbend", MemoryConfig(packing="on"))
    assert len(verification.checks) == CASES + STEPS
    assert not verification.unsupported
    assert not _failed(verification)
    assert verification.passed


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_combined_cases_with_every_memory_setting(tmp_path, memory) -> None:
    folder = _copy(tmp_path, "default")
    verification = verify_folder(folder, MemoryConfig(**memory))
    assert len(verification.checks) == 6
    assert not _failed(verification)


def _copy(tmp_path: Path, ending: str) -> Path:
    """A copy of the golden folder with the cases whose key ends so, and without the trajectory."""
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN / "repbend", folder, ignore=shutil.ignore_patterns("trajectory.json"))
    _edit(folder, cases=[c for c in _expected(folder)["cases"] if c["key"].endswith(ending)])
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The one case whose terms nearly cancel."""
    return _copy(tmp_path, COMBINED)


def _expected(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())


def _edit(folder: Path, **values) -> None:
    (folder / "expected.json").write_text(json.dumps(_expected(folder) | values))


def test_the_copy_passes(small, capsys) -> None:
    assert run_verify(small) == 0
    out = capsys.readouterr().out
    assert COMBINED in out
    assert "1 of 1 within 1e-05 (loss) and 0.0001 (gradient)" in out


def test_who_listens_gets_the_table_and_the_terminal_nothing(small, capsys) -> None:
    said: list[str] = []
    with saying(said.append):
        assert run_verify(small) == 0
    assert COMBINED in said[0]
    assert said[1] == "1 of 1 within 1e-05 (loss) and 0.0001 (gradient)"
    assert capsys.readouterr().out == ""


def test_a_wrong_loss_fails(small, capsys) -> None:
    (case,) = _expected(small)["cases"]
    _edit(small, cases=[case | {"loss": case["loss"] + 1e-3}])
    assert run_verify(small) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", ["zeroed", "sign-flipped", "row-shifted", "one tensor zeroed", "renamed", "missing", "not finite"]
)
def test_a_wrong_gradient_fails(small, wrong) -> None:
    path = small / f"grads.{COMBINED}.safetensors"
    recorded = load_file(path)
    first = next(iter(recorded))
    if wrong == "zeroed":
        recorded = {k: torch.zeros_like(v) for k, v in recorded.items()}
    elif wrong == "sign-flipped":
        recorded = {k: -v for k, v in recorded.items()}
    elif wrong == "row-shifted":
        recorded = {k: v.roll(1, dims=0).contiguous() for k, v in recorded.items()}
    elif wrong == "one tensor zeroed":
        recorded[first] = torch.zeros_like(recorded[first])
    elif wrong == "renamed":
        recorded[first + ".other"] = recorded.pop(first)
    elif wrong == "missing":
        del recorded[first]
    else:
        recorded[first] = torch.full_like(recorded[first], float("nan"))
    save_file(recorded, path)
    (check,) = verify_folder(small).checks
    assert check.loss_error <= LOSS_TOLERANCE
    assert not check.passed


def test_a_wrong_gradient_norm_fails(small) -> None:
    (small / f"grads.{COMBINED}.safetensors").unlink()
    assert verify_folder(small).passed
    (case,) = _expected(small)["cases"]
    _edit(small, cases=[case | {"grad_norm": case["grad_norm"] * 1.001}])
    assert not verify_folder(small).passed


def test_a_changed_trajectory_fails(small) -> None:
    trajectory = json.loads((GOLDEN / "repbend" / "trajectory.json").read_text())
    trajectory["steps"] = trajectory["steps"][:3]
    path = small / "trajectory.json"
    path.write_text(json.dumps(trajectory))
    assert verify_folder(small).passed
    path.write_text(json.dumps(trajectory | {"lr": trajectory["lr"] * 1.1}))
    verification = verify_folder(small)
    assert [c.key for c in verification.checks if not c.passed] == ["trajectory.1", "trajectory.2"]


def test_window_and_architecture_come_from_the_folder(small) -> None:
    _edit(small, window=[1, 2, 3])
    assert not verify_folder(small).passed
    for window in ([2, 3, 99], [4, 5, 6, 7]):
        _edit(small, window=window)
        with pytest.raises(UserError, match="window"):
            verify_folder(small)


@pytest.mark.parametrize("memory", [{}, *MEMORY.values()], ids=["default", *MEMORY])
def test_circuit_breakers_and_npo(memory) -> None:
    verification = verify_folder(GOLDEN / "baselines", MemoryConfig(**memory))
    assert {c.key.split(".")[1] for c in verification.checks} == {"circuit_breaker", "npo"}
    assert len(verification.checks) == 5
    assert not _failed(verification)
    assert not verification.unsupported
    assert verification.passed


def _baselines(tmp_path: Path, key: str, **values) -> Path:
    """A copy of the baselines' folder with one case, changed."""
    folder = tmp_path / "baselines"
    shutil.copytree(GOLDEN / "baselines", folder)
    _edit(folder, cases=[c | values for c in _expected(folder)["cases"] if c["key"] == key])
    return folder


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("c0.circuit_breaker.step75", {"step": 76}),
        ("c0.circuit_breaker.step75", {"max_steps": 149}),
        ("c0.circuit_breaker.step75", {"target_hidden_states": [2, 3]}),
        ("c0.circuit_breaker.step75", {"alpha": 9.9}),
        ("c0.npo.beta0.1.kl0.1", {"beta": 0.11}),
        ("c0.npo.beta0.1.kl0.1", {"retain_kl": 0.2}),
        ("c0.npo.beta0.1.kl0.1", {"temperature": 1.0}),
    ],
)
def test_wrong_settings_of_a_baseline_fail(tmp_path, key, values) -> None:
    (check,) = verify_folder(_baselines(tmp_path, key, **values)).checks
    assert not check.passed


def test_objectives_that_do_not_exist_are_listed(tmp_path, capsys) -> None:
    folder = _baselines(tmp_path, "c0.npo.beta0.1.kl0.1", objective="other")
    assert run_verify(folder) == 1
    out = capsys.readouterr().out
    assert "not supported: c0.npo.beta0.1.kl0.1" in out
    assert "nothing was checked" in out
    assert run_verify(folder, ["other"]) == 1
    assert run_verify(GOLDEN / "baselines", ["circuit_breaker", "npo"]) == 0
    assert run_verify(GOLDEN / "baselines", ["rmu"]) == 1


def test_asking_for_an_objective_that_has_no_case_fails(small) -> None:
    assert run_verify(small, ["repbend"]) == 0
    assert run_verify(small, ["npo"]) == 1
    assert run_verify(small, ["repbend", "npo"]) == 1


def test_errors_name_what_is_missing(small, tmp_path) -> None:
    with pytest.raises(UserError, match=r"expected\.json"):
        verify_folder(tmp_path)
    batch = small / "batch.b0.json"
    batch.write_text('{"safe": [{"prompt": [1, 2]}]}')
    with pytest.raises(UserError, match=r"batch\.b0\.json"):
        verify_folder(small)
    batch.unlink()
    with pytest.raises(UserError, match=r"batch\.b0\.json"):
        verify_folder(small)


@pytest.mark.parametrize("part", ["base_model", "adapter"])
def test_a_folder_without_a_part_is_a_user_error(small, part) -> None:
    shutil.rmtree(small / part)
    with pytest.raises(UserError, match=part):
        verify_folder(small)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"cases": [{"key": "x"}], "window": [1]}'], ids=["broken", "list", "empty", "no batch"]
)
def test_a_malformed_expected_file_is_a_user_error(small, text) -> None:
    (small / "expected.json").write_text(text)
    with pytest.raises(UserError, match=r"expected\.json"):
        verify_folder(small)


@pytest.mark.parametrize(
    "change", [{"lr": None}, {"steps": [{"step": 0}]}, {"loss_mode": "other"}], ids=["lr", "step", "mode"]
)
def test_a_malformed_trajectory_is_a_user_error(small, change) -> None:
    trajectory = json.loads((GOLDEN / "repbend" / "trajectory.json").read_text())
    (small / "trajectory.json").write_text(json.dumps(trajectory | change))
    with pytest.raises(UserError, match=r"trajectory\.json"):
        verify_folder(small)


def test_no_cases_are_no_success(small, capsys) -> None:
    _edit(small, cases=[])
    assert run_verify(small) == 1
    assert "nothing was checked" in capsys.readouterr().out
    trajectory = json.loads((GOLDEN / "repbend" / "trajectory.json").read_text())
    (small / "trajectory.json").write_text(json.dumps(trajectory | {"steps": []}))
    with pytest.raises(UserError, match="no steps"):
        verify_folder(small)
    (small / "trajectory.json").write_text(json.dumps(trajectory))
    assert len(verify_folder(small).checks) == STEPS


def test_a_check_of_the_norm_alone_says_so(small, capsys) -> None:
    assert run_verify(small) == 0
    assert "(norm)" not in capsys.readouterr().out
    (small / f"grads.{COMBINED}.safetensors").unlink()
    assert run_verify(small) == 0
    assert "(norm)" in capsys.readouterr().out


@pytest.mark.parametrize("name", [f"grads.{COMBINED}.safetensors", "adapter/adapter_model.safetensors"])
def test_cut_tensors_are_a_user_error(small, name) -> None:
    (small / name).write_bytes((small / name).read_bytes()[:100])
    with pytest.raises(UserError, match=Path(name).name):
        verify_folder(small)


def test_a_term_without_a_value_fails_and_does_not_divide_by_zero(small) -> None:
    """At B = 0 every distance is 0, where the record is not."""
    path = small / "adapter" / "adapter_model.safetensors"
    save_file(
        {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in load_file(path).items()},
        path,
    )
    (check,) = verify_folder(small).checks
    assert not check.passed


def test_an_adapter_trained_with_dropout_is_verified_without(small) -> None:
    path = small / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.3}))
    assert verify_folder(small).passed


def test_nan_never_passes() -> None:
    nan = float("nan")
    assert not Check("x", 1.0, nan, nan, 0.0).passed
    assert not Check("x", 1.0, 1.0, 0.0, nan).passed
    assert Check("x", 1.0, 1.0, LOSS_TOLERANCE, GRADIENT_TOLERANCE).passed
    assert not Verification([], {}).passed


def test_batches_keep_pairs_on_one_prompt() -> None:
    batch = load_batch(GOLDEN / "repbend" / "batch.b0.json")
    assert batch.pairs
    assert batch.retain
    for pair in batch.pairs:
        assert pair.unsafe.prompt == pair.safe.prompt
        assert pair.unsafe.ids[0] == 1
    assert all(s.prompt_length == 0 for s in batch.retain)
