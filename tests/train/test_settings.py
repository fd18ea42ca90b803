"""Settings: aliases, kinds, unknown keys, and the way back from flat keys."""

from typing import Any

import pytest

import loratory as lt
from loratory.train.settings import TrainSettings, default_of, field_docs, read_settings

LEAST = {"base": "b", "train": "t"}


def test_names_of_other_libraries_mean_the_same() -> None:
    ours = read_settings(
        {**LEAST, "rank": 4, "alpha": 8.0, "dropout": 0.1, "where": ["q_proj", "v_proj"], "also_train": ["lm_head"]}
    )
    peft = read_settings(
        {
            "model": "b",
            "dataset": "t",
            "r": 4,
            "lora-alpha": 8.0,
            "lora_dropout": "0.1",
            "target_modules": ["q_proj", "v_proj"],
            "modules-to-save": ["lm_head"],
        }
    )
    assert ours == peft
    assert peft.method_options == {"rank": 4, "alpha": 8.0, "dropout": 0.1}
    assert peft.also_train == ("lm_head",)
    assert read_settings({**LEAST, "use_dora": True, "rank": 2}).method == "dora"
    assert read_settings({**LEAST, "warmup_ratio": 0.1}).warmup_steps == 0.1


@pytest.mark.parametrize(
    ("one", "other"), [("r", "lora_rank"), ("lora_alpha", "alpha"), ("where", "target_modules"), ("train", "data")]
)
def test_one_setting_under_two_names_is_refused(one: str, other: str) -> None:
    with pytest.raises(ValueError, match=f"'{one}' and '{other}' are the same setting"):
        read_settings({**LEAST, **{one: 1}, **{other: 1}})


def test_text_becomes_the_fields_kind() -> None:
    found = read_settings(
        {**LEAST, "rank": "8", "learning_rate": "1e-3", "max_steps": "-1", "also_train": "a,b", "overwrite": "true"}
    )
    assert found.method_options == {"rank": 8}
    assert (found.learning_rate, found.max_steps, found.also_train, found.overwrite) == (1e-3, -1, ("a", "b"), True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank", "many", "rank is 'many'; it must be a whole number or none"),
        ("max_steps", 1.5, "max_steps is 1.5; it must be a whole number"),
        ("dtype", "int8", "dtype is 'int8'; it must be one of float32, bfloat16, float16, auto"),
        ("per_layer", "x", "per_layer is 'x'; it must be a table"),
        ("train_rows", 0, "train_rows is 0; it must be at least 1"),
        ("max_minutes", 0, "max_minutes is 0.0; it must be above 0"),
        ("rang", 8, "there is no setting 'rang'; nearest names: rank"),
        ("learning_rte", 1, "there is no setting 'learning_rte'; nearest names: learning_rate"),
        ("load_in_4bit", True, "'load_in_4bit' is called quantize here: give quantize: nf4"),
        ("method", "lorra", "there is no method 'lorra'; nearest names: lora"),
        ("task", "clasification", "there is no task 'clasification'; nearest names: classification"),
        ("tokens_column", "x", "there is no setting 'tokens_column'"),  # of another task
    ],
)
def test_mistakes_have_their_message(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings({**LEAST, key: value})


def test_what_must_be_given() -> None:
    with pytest.raises(ValueError, match=r"base is missing: model to adapt"):
        read_settings({"train": "t"})
    with pytest.raises(ValueError, match=r"train is missing: training rows"):
        read_settings({"base": "b"})
    with pytest.raises(ValueError, match=r"resume and overwrite are both given"):
        read_settings({**LEAST, "resume": True, "overwrite": True})


def test_other_training_arguments_are_passed_on() -> None:
    assert read_settings({**LEAST, "neftune_noise_alpha": "5"}).training_options == {"neftune_noise_alpha": 5}


def test_flat_keys_give_the_same_settings_back() -> None:
    made = read_settings(
        {
            **LEAST,
            "task": "tagging",
            "method": lt.DoRA(rank=3),
            "tags_column": "t",
            "adam_beta2": 0.9,
            "rank_pattern": {"q_proj": 4},
            "blocks": [0],
        }
    )
    assert made.method == "dora"
    assert made.method_options["rank"] == 3
    assert made.task_options == {"tags_column": "t"}
    assert read_settings(made.flat()) == made


def test_every_setting_says_what_it_is() -> None:
    docs = field_docs(TrainSettings)
    assert all(docs.values()), [name for name, doc in docs.items() if not doc]
    assert default_of(next(f for f in TrainSettings.__dataclass_fields__.values() if f.name == "seed")) == 42


def test_a_small_number_without_a_point_is_a_number() -> None:
    assert read_settings({"base": "b", "train": "t", "adam_epsilon": "1e-5"}).training_options == {"adam_epsilon": 1e-5}
