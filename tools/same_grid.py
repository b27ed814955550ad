"""The tables of `scripts/same`: what is run, which value every flag is tried with, and what may differ.

A value is the words that are put behind the verb's usual ones (flags given twice: the last wins). "A | B" means: B is
tried on top of A, and must change what A gives. A leading "=" says that no change is expected (speed, workers). A list
is several rows. `Because` is a flag that has no row, and why. $S is the folder of shared models and data; other paths
are those of rows, named VERB/SLUG, as the report prints them.
"""

from __future__ import annotations


class Because(str):
    """Why a flag has no row of its own."""


HUB = Because("names a commit on the Hub or runs code from it; there is no network here")
PLACE = Because("every row has a folder of its own")
GPU = Because("needs a GPU")
NEW = Because("the old code lacks the verb")
BASE = Because("is in the usual words of every row of the verb")
SOURCE = {
    "data": [f"= --data $S/captions.{kind}" for kind in ("tsv", "jsonl", "parquet")]
    + ["--data $S/tars/{00..01}.tar", "--data $S/folder", "--data $S/captions.csv $S/more.csv"],
    "captions": "--captions long=long_caption,note short=short_caption",
    "image": "= --image mirror",
    "allow_outside": "= --data $S/sub/outside.csv --allow-outside",
    "max_bad_fraction": "--data $S/bad.csv --max-bad-fraction 0.5",
    "revision": HUB,
    "split": Because("the old code lacks it"),
    "text_lines": Because("the old code lacks it"),
    "image_root": Because("the old code lacks it"),
    "views": Because("the old code lacks it"),
}
ENCODE = {
    "precision": "--precision bf16",
    "device": "= --device cpu",
    "batch_tokens": "= --batch-tokens 64",
    "compile": Because("see OWN_PROCESS"),
    "shard": "= --shard 0/1",
    "teacher_revision": HUB,
    "trust_remote_code": HUB,
}
MNTP = "--mntp --mntp-steps 3 --mntp-batch-size 8"
KINDS = "--captions short=short_caption long=long_caption note=note"
VAL = "--val-bank build-bank/base"
TWO_BANKS = "--bank build-bank/base build-bank/data=captions.jsonl"
LORA = ("--learning-rate 1e-3", "--weight-decay 0.5", "--max-grad-norm 1e-3", "--lora-rank 4", "--lora-alpha 5")
TARGETS = ("transformers", "tower")

USUAL = {
    "train-teacher": "--data $S/captions.csv --model $S/llm --precision fp32 --steps 3 --batch-size 8",
    "join-teachers": "--teachers $S/llm $S/st",
    "build-bank": "--data $S/captions.csv --teacher $S/llm --precision fp32",
    "bank info": "build-bank/base",
    "bank verify": "build-bank/base",
    "bank add": "build-bank/base --data $S/more.csv --precision fp32",
    "bank merge": "build-bank/base build-bank/data=_00..01_.tar",
    "bank export": "build-bank/base",
    "train-student": "--bank build-bank/base --tower $S/tower --precision fp32 --steps 3 --batch-size 8 --workers 0 "
    "--tracker none",
    "evaluate": "--data $S/captions.csv --model train-student/base --teacher $S/llm --precision fp32",
    "export": "--model train-student/base --teacher $S/llm --to sentence-transformers",
    "demo": "--quick",
}
"""The row `base` of each verb: no more than what a tiny model on a CPU needs, so that defaults are seen too."""

GRID: dict[str, dict[str, str | list[str]]] = {
    "train-teacher": {
        **SOURCE,
        "model": Because("other families are transformers' own; $S/llm-chat is another folder"),
        "out": PLACE,
        "model_revision": HUB,
        "trust_remote_code": HUB,
        "text_pairs": "--text-pairs $S/nli.jsonl",
        "instructions": "--text-pairs $S/nli.jsonl | --instructions 'nli=the large red disc'",
        "caption_instruction": "--caption-instruction 'this picture shows'",
        "source_weights": "--text-pairs $S/nli.jsonl | --source-weights captions=1 nli=9",
        "pair_weights": f"{KINDS} | --pair-weights short+long=1",
        "positives": "--positives same",
        "random_negative": "--no-random-negative",
        "mask_duplicates": "--no-mask-duplicates",
        "attention": "--attention causal",
        "pooling": ["--pooling last-token", "--pooling weighted"],
        "max_length": "--caption-instruction '' | --max-length 6",
        "chat_template": "--model $S/llm-chat | --chat-template",
        "tuning": ["--tuning full", "--adaptor-layers 1 | --tuning frozen"],
        "adaptor_layers": "--adaptor-layers 1",
        "lora_rank": "--lora-rank 4",
        "lora_alpha": "--lora-alpha 5",
        "lora_dropout": "--lora-dropout 0.5",
        "attention_dropout": "--attention-dropout 0.3",
        "quantize": GPU,
        "save_adapter": "--save-adapter",
        "scale": "--scale 5",
        "steps": "--steps 2",
        "epochs": "--steps None --epochs 2",
        "batch_size": "--batch-size 6",
        "micro_batch_size": "= --micro-batch-size 3",
        "learning_rate": "--learning-rate 1e-3",
        "warmup_steps": "--steps 20 | --warmup-steps 1",
        "weight_decay": "--weight-decay 0.5",
        "max_grad_norm": "--max-grad-norm 1e-3",
        "precision": "--precision bf16",
        "gradient_checkpointing": "= --gradient-checkpointing",
        "workers": "= --workers 2",
        "save_every": "= --save-every 1",
        "seed": "--seed 1",
        "mntp": [
            MNTP,
            *(f"{MNTP} | {flag}" for flag in (*LORA, "--tuning full", "--lora-dropout 0.5")),
            *(f"{MNTP} | {flag}" for flag in ("--seed 1", "--precision bf16", "--attention causal")),
            f"{MNTP} --caption-instruction '' | --max-length 6",
            f"{MNTP} --mntp-steps 20 | --warmup-steps 1",
        ],
        "mntp_steps": f"{MNTP} | --mntp-steps 2",
        "mntp_batch_size": f"{MNTP} | --mntp-batch-size 6",
        "mntp_mask": f"{MNTP} | --mntp-mask 0.5",
        "mntp_mask_token": f"{MNTP} | --mntp-mask-token the",
        "mntp_text": f"{MNTP} | --mntp-text $S/plain.txt",
        "eval_data": "--eval-data $S/more.csv",
        "eval_images": "--eval-images 5",
        "eval_every": "--eval-every 1",
        "join": Because("the old code lacks it"),
        "join_revisions": HUB,
    },
    "join-teachers": {
        "teachers": ["--teachers $S/st $S/llm", "--teachers $S/llm $S/clip"],
        "out": PLACE,
        "weights": "--weights 1 3",
        "revisions": "= --revisions main main",
        "trust_remote_code": HUB,
    },
    "build-bank": {
        **SOURCE,
        **ENCODE,
        "image": "--image mirror",
        "teacher": ["--teacher train-teacher/base", "--teacher join-teachers/base", "--teacher $S/st"],
        "out": PLACE,
        "prompt": "--prompt 'a picture of '",
        "prompt_name": "--teacher $S/st | --prompt-name query",
        "dtype": ["--dtype float32", "--dtype bfloat16", "--dtype int8"],
        "shard_rows": "= --shard-rows 8",
        "reuse": "= --reuse build-bank/data=more.csv",
        **dict.fromkeys(("text_only", "benchmark", "root"), Because("the old code lacks it")),
    },
    "bank info": {"bank": "build-bank/dtype=int8", "json": "--json"},
    "bank verify": {
        "bank": "build-bank/dtype=int8",
        "teacher": "--teacher none",
        "sample": "--sample 5",
        "min_cosine": "= --min-cosine 0.5",
        "device": "= --device cpu",
        "trust_remote_code": HUB,
        "seed": "= --seed 1",
    },
    "bank add": {
        **SOURCE,
        **ENCODE,
        "bank": "build-bank/dtype=int8",
        "out": PLACE,
        "teacher": "= --teacher $S/llm",
        "image": "--image mirror",
        "precision": Because("must be the bank's"),
    },
    "bank merge": {"banks": "build-bank/base build-bank/data=more.csv", "out": PLACE},
    "bank export": {
        "bank": "build-bank/dtype=int8",
        "out": PLACE,
        "rows_per_file": "--rows-per-file 9",
        "kinds": "--kinds long",
    },
    "train-student": {
        "bank": [TWO_BANKS, "--bank build-bank/dtype=int8", "--bank build-bank/data=_00..01_.tar"],
        "tower": ["--tower $S/siglip", "--tower $S/vit", "--tower $S/clip"],
        "out": PLACE,
        "tower_revision": HUB,
        "init": "--init random",
        "image_size": "--image-size 48",
        "dim": "--dim 16",
        "adaptor_blocks": "--adaptor-blocks 1",
        "mix": "--mix short=3 long=1",
        "captions_per_image": "--captions-per-image 2",
        "bank_weights": f"{TWO_BANKS} | --bank-weights 1 9",
        "min_crop": "--min-crop 0.3",
        "max_bad_fraction": "--bank build-bank/data=broken.csv --max-bad-fraction 0.5",
        "loss": "--loss sigmoid",
        "label_smoothing": "--label-smoothing 0.1",
        "steps": "--steps 2",
        "epochs": "--steps None --epochs 2",
        "batch_size": "--batch-size 6",
        "micro_batch_size": "= --micro-batch-size 3",
        "accumulate": "--accumulate 2",
        "optimizer": "--optimizer muon",
        "learning_rate": "--learning-rate 1e-3",
        "adaptor_learning_rate": "--adaptor-learning-rate 1e-2",
        "warmup_steps": "--warmup-steps 2",
        "adaptor_warmup_steps": ["--adaptor-warmup-steps 1", "--unlocked-blocks 1 | --adaptor-warmup-steps 1"],
        "weight_decay": "--weight-decay 0.5",
        "layer_decay": "--layer-decay 0.5",
        "max_grad_norm": "--max-grad-norm 1e-3",
        "unlocked_blocks": ["--unlocked-blocks 1", "--unlocked-blocks 0"],
        "lora_rank": "--lora-rank 2",
        "lora_alpha": "--lora-rank 2 | --lora-alpha 5",
        "patch_dropout": "--patch-dropout 0.5",
        "ema": ["--ema 0.5", f"{VAL} --val-every 1 | --ema 0.5"],
        "precision": "--precision bf16",
        "gradient_checkpointing": "= --gradient-checkpointing",
        "compile": Because("see OWN_PROCESS"),
        "workers": "= --workers 2",
        "save_every": "= --save-every 1",
        "seed": "--seed 1",
        "tracker": "= --tracker tensorboard",
        "val_bank": VAL,
        "val_every": f"{VAL} | --val-every 1",
        "patience": f"{VAL} --val-every 1 --steps 6 | --patience 1",
        **dict.fromkeys(
            ("inherit", "inherit_kinds", "inherit_bank", "inherit_cache", "inherit_noise", "keep", "keep_text"),
            Because("the old code lacks it"),
        ),
        **dict.fromkeys(("val", "val_root", "val_score"), Because("the old code lacks it")),
    },
    "evaluate": {
        **SOURCE,
        "image": "--image mirror",
        "out": PLACE,
        "model": ["--model $S/clip --teacher None", "--model export/base --teacher None", "--model None"],
        "teacher": "--model None --teacher $S/st",
        "model_revision": HUB,
        "teacher_revision": HUB,
        "trust_remote_code": HUB,
        "baseline": Because("the old code lacks it"),
        **dict.fromkeys(
            ("benchmark", "root", "download", "list", "compare", "cache"), Because("the old code lacks it")
        ),
        "precision": "--precision bf16",
        "batch_size": "= --batch-size 5",
        "device": "= --device cpu",
        "seed": "= --seed 1",
    },
    "export": {
        "model": ["--model train-student/tower=siglip", "--model train-student/loss=sigmoid"],
        "to": [f"--to {target}" for target in TARGETS],
        "out": PLACE,
        "teacher": "= --to transformers --teacher None",
        "report": "--report evaluate/base/report.json",
        "model_revision": HUB,
        "teacher_revision": HUB,
        "trust_remote_code": HUB,
        "device": "= --device cpu",
    },
    "convert": dict.fromkeys(("model", "out", "model_revision"), NEW),
    "push": dict.fromkeys(("folder", "name", "private"), NEW),
    "recipes": {"name": NEW},
    "demo": {
        "out": PLACE,
        "seed": Because("minutes a run; base shows all its parts"),
        "seeds": Because("minutes a run"),
        "quick": BASE,
        "size": Because("hours on a CPU"),
        "ablations": Because("minutes a run; --quick has them"),
        "processes": Because("minutes a run"),
    },
}
"""Verb -> field of its config -> value or reason. A field without an entry fails the comparison."""

START = "--steps 1 --learning-rate 1e-50 --weight-decay 0"
EXTRA = {
    "train-student": [
        f"{START} --adaptor-learning-rate 1e-50",  # the weights as they were drawn
        "= --config train-student/ema=0.5/run.json --ema 0 --tracker none",
        "--loss sigmoid --micro-batch-size 3 --captions-per-image 2",
        "--steps 12 --warmup-steps 3 --ema 0.9 --optimizer muon --micro-batch-size 4",
    ],
    "train-teacher": [f"--tuning full {START}", "--tuning full --steps 12 --weight-decay 0.5 --micro-batch-size 3"],
    "build-bank": ["--data $S/more.csv", "--data $S/broken.csv"],
}
"""Rows of no single flag."""
OWN_PROCESS = {
    "train-student": [("compile", "--compile"), ("torchrun", "--micro-batch-size 2"), ("torchrun", "--loss sigmoid")],
    "train-teacher": [("torchrun", "--micro-batch-size 2"), ("torchrun", MNTP)],
    "build-bank": [("compile", "--compile"), ("torchrun", "--shard-rows 8")],
}
"""Rows in processes of their own: two under torchrun, or one where torch.compile may change what comes after."""
SLOW_VERBS = ("demo",)
"""Left out by --quick, as are the rows of OWN_PROCESS."""
BANK_VERBS = ("build-bank", "bank add", "bank merge")
"""Of these only the manifest is compared as a file; what is inside through `bank export` and `bank info --json`."""
ENCODED = {"train-student/base": "$S/llm", "train-student/tower=siglip": "$S/llm", "export/base": "-"}
"""Students and bundles, with their teachers ("-": none), opened by the public `LLM2CLIP`; its vectors are compared."""

RENAMED: dict[str, dict[str, str]] = {
    "train-teacher": {"eval_pictures": "eval_images"},
    "train-student": {"captions_per_picture": "captions_per_image"},
}
"""Verb -> old field -> new field. The grid above has the new names."""
REMOVED: dict[str, dict[str, str]] = {
    "train-student": {
        "soft_targets": "no gain over three seeds (docs/lab-notes.md)",
        "ignore_above": "no gain over three seeds (docs/lab-notes.md)",
    },
    "bank export": {"to": "datasets.load_dataset reads the Parquet files"},
}
"""Verb -> field of the old code that is gone -> why. Verbs that are gone: field "*"."""
_READS = {
    "split": "all rows as before, where it is not given",
    "text_lines": "differs for texts of several lines alone",
    "image_root": "images beside the table as before, where it is not given",
    "views": "none by default",
}
ADDED: dict[str, dict[str, str]] = {
    "convert": {"*": "a new verb"},
    "push": {"*": "a new verb"},
    "recipes": {"*": "a new verb"},
    "demo": {"ablations": "arms that a quick run has as before, others if asked"},
    "train-teacher": {**_READS, **dict.fromkeys(("join", "join_revisions"), "none by default")},
    "bank add": _READS,
    "build-bank": {**_READS, "text_only": "off by default", **dict.fromkeys(("benchmark", "root"), "in place of data")},
    "train-student": {
        **dict.fromkeys(
            ("inherit", "inherit_kinds", "inherit_bank", "inherit_cache", "inherit_noise", "keep", "keep_text"),
            "for towers that come with a text half alone",
        ),
        **dict.fromkeys(("val", "val_root", "val_score"), "new: named benchmarks pick the weights"),
    },
    "evaluate": {
        **_READS,
        "baseline": "adds to the report; the model's own scores are as before",
        **dict.fromkeys(("benchmark", "root", "download", "list", "compare", "cache"), "new: named benchmarks"),
    },
}
"""Verb -> field that the old code lacks -> why the rest is as before. Verbs that are new: field "*"."""
RENAMED_OUTPUT: dict[str, str] = {
    "pictures": "images",
    "bad_pictures": "bad_images",
    "truncated picture": "truncated image",
    "eval_pictures": "eval_images",
    "captions_per_picture": "captions_per_image",
}
"""Old key -> new key, in every JSON file and log, at any depth."""
VOLATILE = frozenset(
    ["target_modules", "seconds", "wall_seconds", "times", "pictures_per_second", "images_per_second", "machine"]
)
"""Keys of JSON files and logs that no two runs share; an adapter's target modules are a set, in any order."""
VOLATILE_TEXT = r"[\d.,]+ ?(s|ms|min|h|seconds|minutes)\b|[\d.,]+/s|\b20\d\d-\d\d-\d\d\b"
"""Times and dates in pages and printed lines."""
LEFT_OUT = {
    ".lock": "holds nothing",
    "events.out.tfevents.*": "times inside; the figures are those of log.jsonl",
    "*.py": "the code of the model that lies in a student's folder, not what it computes",
    "hparams.yml": "in a folder named by the time; the settings are those of run.json",
    "log.txt": "what processes said while the demo ran, with times",
    "*.html": "a page for people; its figures are those of report.json and results.json",
}
"""Names of files that are not compared, and why."""
ALLOWED: list[tuple[str, str, str]] = [
    ("train-student", "default val_every", "a tenth of a run of less than 5,000 steps; rows name one"),
    ("train-*", "default precision", "auto since 54488bc: what the machine computes fast; rows name fp32"),
    (
        "train-student",
        "default batch_size",
        "since 54488bc all pictures where there are fewer than 4,096; rows name one",
    ),
    (
        "train-teacher/*precision=bf16",
        "manifest.json after/*",
        "since 54488bc scored with position frequencies in fp32, as the saved teacher has them",
    ),
    ("train-teacher/*eval-data*", "manifest.json probed_on", "since 54488bc in words, not as a flag"),
    *(
        ("*bank*", place, "a bank's format is 2 since 54488bc; what is in it is compared by its export and its info")
        for place in (
            "manifest.json format_version",
            "manifest.json fingerprint",
            "manifest.json source_fingerprint",
            "manifest.json shards*",
            "manifest.json table*",
            "* bank_fingerprint",
            "* config/bank_fingerprint",
        )
    ),
    ("*@info", "stdout fingerprint", "of a bank's files"),
    ("*@info", "stdout source_fingerprint", "of a merged bank: of its banks' fingerprints"),
    ("*@info", "stdout bytes/*", "of other files"),
    ("bank-info*", "stdout*", "shards and not files; sizes and fingerprint of other files"),
    ("bank-verify*", "stdout line 0", "files and shards that were checked"),
    ("*@info", "stdout shards", "of a grown or merged bank: plain ranges of its rows"),
    ("train-student/*", "manifest.json bank_fingerprints/*", "of a bank's files"),
    ("train-teacher/*", "manifest.json captions_cut", "counted since 54488bc"),
    *(
        ("*bank*", place, "captions that are cut are counted since 54488bc")
        for place in ("manifest.json cut", "stdout cut")
    ),
    ("evaluate/*", "report.json datasets/*/captions_cut", "counted since 54488bc for students and teachers too"),
    ("evaluate/*", "report.md*", "the same; its scores are compared in report.json"),
    *(
        ("evaluate/*", f"report.json {place}", "new since 54488bc; scores and their chance are as before")
        for place in ("intervals*", "protocol*", "baseline*", "chance/*cra*", "model/kinds*", "datasets/*/notes*")
    ),
    ("evaluate/*", "manifest.json model/kinds*", "which kinds a student was trained on"),
    ("export/*", "manifest.json kinds*", "the same"),
    ("train-student/*", "manifest.json kinds*", "the same"),
    ("export/*", "README.md*", "the card says image"),
    ("export/*", "manifest.json load_options", "a fact for the card"),
    *(
        (
            "train-teacher/*mntp*",
            place,
            "since 54488bc transformers' collator draws what stands for a hidden token; see tests/teacher/oracle.py",
        )
        for place in (
            *("mntp.jsonl *", "log.jsonl *", "*.safetensors *"),
            *(f"manifest.json {key}" for key in ("before/*", "after/*", "files/*", "fingerprint", "merge_error")),
        )
    ),
]
"""(row, place, why) of what may differ, with * and ?; a place is "FILE KEY/KEY" or "default FIELD", as printed."""
