"""A well-written FastAPI server over one ONNX model: uvloop, httptools, orjson, onnxruntime, one worker.

`/quickest` reads the body itself and validates nothing; `/validated` declares the request as pydantic models,
the way FastAPI's own documentation does: then a wrong request is a 422 instead of a 500.
Run: `python benchmarks/baseline_fastapi.py MODEL PORT`
"""

import sys
from typing import Literal

import numpy as np
import onnxruntime
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel


class Tensor(BaseModel):
    """One tensor of a V2 request."""

    name: Literal["pixels"]
    shape: list[int]
    datatype: Literal["FP32"]
    data: list[float]


class InferRequest(BaseModel):
    """A V2 request."""

    inputs: list[Tensor]


def make_app(model: str) -> FastAPI:
    """V2 JSON in, V2 JSON out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    app = FastAPI()

    def answer(name: str, data: list[float], shape: list[int]) -> Response:
        pixels = np.array(data, dtype=np.float32).reshape(shape)
        (found,) = session.run(None, {name: pixels})  # quicker than a hand-over to a thread
        output = {"name": "probabilities", "datatype": "FP32", "shape": found.shape, "data": found.reshape(-1)}
        body = {"model_name": "digits", "model_version": "1", "outputs": [output]}
        return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

    @app.post("/quickest")
    async def quickest(request: Request) -> Response:
        value = orjson.loads(await request.body())["inputs"][0]
        return answer(value["name"], value["data"], value["shape"])

    @app.post("/validated")
    async def validated(request: InferRequest) -> Response:
        value = request.inputs[0]
        return answer(value.name, value.data, value.shape)

    return app


if __name__ == "__main__":
    uvicorn.run(
        make_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), loop="uvloop", http="httptools",
        workers=1, access_log=False, log_level="warning",
    )  # fmt: skip
