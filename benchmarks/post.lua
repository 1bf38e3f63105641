-- wrk: POST the file named in BODY; JSON_BYTES, when set, is the length of the JSON before binary tensors.
local file = assert(io.open(os.getenv("BODY"), "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
local json_bytes = os.getenv("JSON_BYTES")
if json_bytes then
  wrk.headers["Content-Type"] = "application/octet-stream"
  wrk.headers["Inference-Header-Content-Length"] = json_bytes
else
  wrk.headers["Content-Type"] = "application/json"
end

-- machine-readable, since wrk's own report rounds
done = function(summary, latency, requests)
  local bad = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format("RESULT %d %d %d %d %d\n", summary.requests, summary.duration, bad,
    latency:percentile(50), latency:percentile(99)))
end
