"""A well-written FastAPI server over one ONNX model: uvloop, httptools, orjson, onnxruntime, one worker.

Nothing is validated by pydantic and nothing is copied twice: this is FastAPI at its quickest.
Run: `python benchmarks/baseline_fastapi.py MODEL PORT`
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response


def make_app(model: str) -> FastAPI:
    """One route: V2 JSON in, V2 JSON out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    app = FastAPI()

    @app.post("/v2/models/digits/infer")
    async def infer(request: Request) -> Response:
        value = orjson.loads(await request.body())["inputs"][0]
        pixels = np.array(value["data"], dtype=np.float32).reshape(value["shape"])
        (answer,) = session.run(None, {value["name"]: pixels})  # quicker than a hand-over to a thread
        body = {
            "model_name": "digits",
            "model_version": "1",
            "outputs": [
                {"name": "probabilities", "datatype": "FP32", "shape": answer.shape, "data": answer.reshape(-1)}
            ],
        }
        return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

    return app


if __name__ == "__main__":
    uvicorn.run(
        make_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), loop="uvloop", http="httptools",
        workers=1, access_log=False, log_level="warning",
    )  # fmt: skip
