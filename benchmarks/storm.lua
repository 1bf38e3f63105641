-- wrk: POST the bodies of a file, one after another, and count answers by status; WAIT_MS: pause of a connection.
-- BODIES: a file of bodies; INDEX: lines "offset length json_bytes", where a JSON length of 0 means a JSON body.
local wait_ms = tonumber(os.getenv("WAIT_MS") or "0")
local threads = {}
local requests, place = {}, 0
good, refused, wrong = 0, 0, 0

function setup(thread) table.insert(threads, thread) end

function init(args)
  local file = assert(io.open(os.getenv("BODIES"), "rb"))
  for line in io.lines(os.getenv("INDEX")) do
    local offset, length, json_bytes = line:match("(%d+) (%d+) (%d+)")
    file:seek("set", tonumber(offset))
    local body = file:read(tonumber(length))
    local headers = { ["Content-Type"] = "application/json" }
    if json_bytes ~= "0" then
      headers = { ["Content-Type"] = "application/octet-stream", ["Inference-Header-Content-Length"] = json_bytes }
    end
    requests[#requests + 1] = wrk.format("POST", nil, headers, body)
  end
  file:close()
end

function request()
  place = place % #requests + 1
  return requests[place]
end

if wait_ms > 0 then
  function delay() return math.random(0, 2 * wait_ms) end
end

function response(status)
  if status == 200 then good = good + 1
  elseif status == 429 or status == 503 then refused = refused + 1
  else wrong = wrong + 1 end
end

function done(summary, latency)
  local e = summary.errors
  local answers = { good = 0, refused = 0, wrong = 0 }
  for _, thread in ipairs(threads) do
    for name in pairs(answers) do answers[name] = answers[name] + thread:get(name) end
  end
  io.write(string.format('{"seconds": %.6f, "good": %d, "refused": %d, "wrong": %d, "lost": %d, "timeout": %d, "p50_s": %.6f, "p99_s": %.6f}\n',
    summary.duration / 1e6, answers.good, answers.refused, answers.wrong, e.connect + e.read + e.write, e.timeout,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
