"""Hugging Face's callback: Trainer(report_to="mlflow") on a tiny model made here."""

import json
import os
import sys
import tempfile
import warnings

import torch
from mlflow import MlflowClient
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

os.environ["MLFLOW_TRACKING_URI"] = sys.argv[1]
os.environ["MLFLOW_EXPERIMENT_NAME"] = "transformers"
warnings.simplefilter("ignore")
rows = [
    {"input_ids": torch.randint(0, 50, (8,)), "attention_mask": torch.ones(8, dtype=torch.long), "labels": index % 2}
    for index in range(16)
]
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, report_to="mlflow", num_train_epochs=1, logging_steps=1, per_device_train_batch_size=4,
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(BertForSequenceClassification(config), arguments, train_dataset=rows).train()
client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name("transformers")
(run,) = client.search_runs([experiment.experiment_id])
assert run.data.params["hidden_size"] == "16", list(run.data.params)[:5]
history = client.get_metric_history(run.info.run_id, "loss")
assert len(history) >= 4, history
print(json.dumps({"run": run.info.run_id}))
