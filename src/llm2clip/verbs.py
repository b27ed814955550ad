"""The table of verbs: what each does, its config and function, and how its help is laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb of the command line.

    Attributes:
        summary: what it does, for the overview.
        config: its settings' dataclass ("module:name").
        function: what takes them and does the work ("module:name").
        memory: the flags to give, or to give lower numbers, where memory runs out; the mildest first.
        main: the settings that matter first, which head its help.
        groups: titles of the help's other groups, each with the first of its settings in the order of the dataclass.
        example: a worked command.
    """

    summary: str
    config: str
    function: str
    memory: tuple[str, ...] = ()
    main: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)
    example: str = ""


VERBS = {
    "train-teacher": Verb(
        summary="turn an LLM into a caption encoder (stage 1)",
        config="llm2clip.teacher.config:TeacherConfig",
        function="llm2clip.teacher.train:train_teacher",
        memory=("--micro-batch-size", "--gradient-checkpointing", "--precision bf16"),
        main="data model join out epochs batch_size eval_data",
        groups={
            "source": "captions",
            "model": "model_revision",
            "pairs": "text_pairs",
            "encoder": "attention",
            "tuning": "tuning",
            "training": "scale",
            "machine": "precision",
            "mntp": "mntp",
            "score": "eval_images",
        },
        example="llm2clip train-teacher --data train.csv --eval-data val.csv --model Qwen/Qwen3-0.6B --out teacher",
    ),
    "join-teachers": Verb(
        summary="one teacher of several, such as an LLM and a CLIP's own text half",
        config="llm2clip.teacher.config:JoinConfig",
        function="llm2clip.teacher.join:join_teachers",
        example="llm2clip join-teachers --teachers teacher openai/clip-vit-large-patch14 --out joined",
    ),
    "build-bank": Verb(
        summary="encode every caption once with the teacher",
        config="llm2clip.bank.config:BankConfig",
        function="llm2clip.bank.build:build_bank",
        memory=("--batch-tokens", "--precision bf16", "--device cpu"),
        main="data teacher out dtype",
        groups={"source": "captions", "machine": "precision", "model": "teacher_revision", "bank": "benchmark"},
        example="llm2clip build-bank --data train.csv --teacher teacher --out bank",
    ),
    "bank info": Verb(
        summary="what a bank holds",
        config="llm2clip.bank.config:BankInfoConfig",
        function="llm2clip.bank.info:bank_info",
        example="llm2clip bank info bank",
    ),
    "bank verify": Verb(
        summary="read every checksum, encode a sample again and compare",
        config="llm2clip.bank.config:BankVerifyConfig",
        function="llm2clip.bank.verify:verify_bank",
        memory=("--device cpu",),
        example="llm2clip bank verify bank --teacher teacher",
    ),
    "bank add": Verb(
        summary="add captions or a kind, encoding only what is new",
        config="llm2clip.bank.config:BankAddConfig",
        function="llm2clip.bank.merge:add_to_bank",
        memory=("--batch-tokens", "--device cpu"),
        main="bank data out teacher",
        groups={"source": "captions", "machine": "precision", "model": "teacher_revision"},
        example="llm2clip bank add bank --data more.csv --out larger",
    ),
    "bank merge": Verb(
        summary="one bank out of several",
        config="llm2clip.bank.config:BankMergeConfig",
        function="llm2clip.bank.merge:merge_banks",
        example="llm2clip bank merge bank-0 bank-1 --out bank",
    ),
    "bank export": Verb(
        summary="the vectors as Parquet",
        config="llm2clip.bank.config:BankExportConfig",
        function="llm2clip.bank.export:export_bank",
        example="llm2clip bank export bank --out vectors",
    ),
    "train-student": Verb(
        summary="fine-tune a vision tower on images and a bank (stage 2)",
        config="llm2clip.student.config:StudentConfig",
        function="llm2clip.student.train:train_student",
        memory=("--micro-batch-size", "--gradient-checkpointing", "--batch-size"),
        main="bank tower out epochs batch_size val_bank",
        groups={
            "tower": "tower_revision",
            "inheritance": "inherit",
            "data": "mix",
            "loss": "loss",
            "training": "steps",
            "optimizer": "optimizer",
            "weights": "unlocked_blocks",
            "machine": "precision",
            "run": "save_every",
            "score": "val_every",
        },
        example="llm2clip train-student --bank bank --val-bank val-bank --tower openai/clip-vit-base-patch16 "
        "--out student",
    ),
    "evaluate": Verb(
        summary="score retrieval and caption retrieval; writes report.json, .md, .html",
        config="llm2clip.eval.config:EvaluateConfig",
        function="llm2clip.eval.run:evaluate",
        memory=("--batch-size", "--precision bf16", "--device cpu"),
        main="data benchmark root download model teacher out list batch_size",
        groups={"source": "captions", "model": "model_revision", "machine": "precision"},
        example="llm2clip evaluate --data test.csv --model student --teacher teacher --out report",
    ),
    "export": Verb(
        summary="write a folder for transformers, sentence-transformers, open_clip or ONNX, or the plain tower",
        config="llm2clip.export.config:ExportConfig",
        function="llm2clip.export.run:export_model",
        memory=("--device cpu",),
        example="llm2clip export --model student --teacher teacher --to sentence-transformers --out bundle",
    ),
    "push": Verb(
        summary="put an exported folder or a teacher onto the Hub, with its card",
        config="llm2clip.export.config:PushConfig",
        function="llm2clip.export.push:push",
        example="llm2clip push bundle me/my-bundle --private",
    ),
    "convert": Verb(
        summary="write a student that the paper's authors released as one of llm2clip's own",
        config="llm2clip.export.config:ConvertConfig",
        function="llm2clip.export.convert:convert",
        example="llm2clip convert microsoft/LLM2CLIP-Openai-L-14-336 --out student",
    ),
    "recipes": Verb(
        summary="what --recipe NAME of a training may name, and what each sets",
        config="llm2clip.recipes:RecipesConfig",
        function="llm2clip.recipes:list_recipes",
        example="llm2clip recipes paper",
    ),
    "demo": Verb(
        summary="the whole pipeline on generated images with mini models (in a checkout of the repository)",
        config="demo.config:DemoConfig",
        function="demo.run:run_demo",
        example="llm2clip demo --out out/demo",
    ),
}
