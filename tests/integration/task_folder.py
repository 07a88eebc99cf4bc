"""A folder of task files as a user would have it: every kind of request, a group, a tag, an include, data beside the files."""

import json

NOUNS = ["film", "movie", "book", "story", "plot", "acting", "food", "service"]
GOOD, BAD = ["good", "great", "fine", "excellent", "brilliant"], ["bad", "awful", "poor", "terrible", "boring"]

SHARED = """
dataset_path: json
dataset_kwargs:
  data_files: {train: data/train.jsonl, validation: data/validation.jsonl, test: data/test.jsonl}
training_split: train
validation_split: validation
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
metadata: {version: 1.0}
"""

FILES = {
    "shared.yaml": SHARED,
    "choose.yaml": """
include: shared.yaml
task: choose
tag: [made_up, all_made_up]
output_type: multiple_choice
doc_to_text: "Review: {{text}}\\nSentiment:"
doc_to_choice: [negative, positive]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "answer.yaml": """
include: shared.yaml
task: answer
tag: made_up
output_type: generate_until
doc_to_text: "Question: {{text}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "last_word.yaml": """
include: shared.yaml
task: last_word
output_type: loglikelihood
doc_to_text: "{{text.split()[:-1] | join(' ')}} "
doc_to_target: "{{text.split()[-1]}}"
target_delimiter: ""
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
    "whole_text.yaml": """
include: shared.yaml
task: whole_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "which_start.yaml": """
include: shared.yaml
task: which_start
output_type: multiple_choice
doc_to_text: label
doc_to_choice: "{{[starts[0], starts[1]]}}"
doc_to_target: "{{ending}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "both.yaml": """
group: both
task: [choose, last_word]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
""",
    "nested.yaml": "group: nested\ntask: [both, answer]\n",
}


def documents(split, count):
    rows = []
    for i in range(count):
        label, noun = (i + (split == "test")) % 2, NOUNS[i % 8]
        word = (GOOD if label else BAD)[i // 2 % 5]
        text = f"{['this', 'the'][i % 2]} {noun} {split} {i} was {word}" + ["", " — naïve ☕", "  "][i % 3]
        starts = [f"we hate the {noun}", f"we love the {noun} "]
        rows.append({"text": text, "label": label, "answer": ["no", "yes"][label], "starts": starts, "ending": f"it is {word}"})
    return rows


def make_folder(folder, train=12, validation=6, test=9):
    """Write the task files and data below `folder`; the rows by split."""
    (folder / "data").mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text.lstrip())
    rows = {s: documents(s, n) for s, n in (("train", train), ("validation", validation), ("test", test))}
    for split, found in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (folder / "data" / f"{split}.jsonl").write_text(lines)
    return rows
