"""Lightning's MLFlowLogger: metrics, parameters, checkpoints as artifacts."""

import json
import logging
import sys
import tempfile
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


class Line(LightningModule):
    """y = 2 x."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


x = torch.linspace(-1, 1, 64)[:, None]
with tempfile.TemporaryDirectory() as folder:
    logger = MLFlowLogger(experiment_name="lightning", tracking_uri=sys.argv[1], log_model=True)
    trainer = Trainer(
        max_epochs=2, logger=logger, log_every_n_steps=1, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[ModelCheckpoint(dirpath=folder + "/checkpoints")],
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(TensorDataset(x, 2 * x), batch_size=16))
client = MlflowClient(sys.argv[1])
run = client.get_run(logger.run_id)
assert run.info.status == "FINISHED", run.info
assert run.data.params["lr"] == "0.1", run.data.params
assert len(client.get_metric_history(logger.run_id, "train_loss")) == 8
assert client.list_artifacts(logger.run_id), "no checkpoint arrived"
print(json.dumps({"run": logger.run_id}))
