#!/bin/sh
# The main job without a key: start the mock service, run the command of the README against it, stop it.
# `python` must be one that has the skill's packages; `make demo` sees to that.
set -eu
scripts=skills/ai/image/alicloud-ai-image-zimage-turbo/scripts

work=$(mktemp -d)
python "$scripts/mock_server.py" --port 0 >"$work/first_line" 2>"$work/log" &
mock=$!
trap 'kill "$mock" 2>/dev/null || true; wait "$mock" 2>/dev/null || true; rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

while [ ! -s "$work/first_line" ]; do
    kill -0 "$mock" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
    sleep 0.05
done
field() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$work/$1" "$2"; }
DASHSCOPE_API_KEY=$(field first_line api_key)
DASHSCOPE_BASE_URL=$(field first_line base_url)
export DASHSCOPE_API_KEY DASHSCOPE_BASE_URL
unset DASHSCOPE_WORKSPACE OUTPUT_DIR

# --overwrite replaces the picture of the last demo; another one under that name was perhaps paid for.
picture=output/ai-image-zimage-turbo/images/fishing.png
mark=output/alicloud-ai-image-zimage-turbo/demo.cksum
if [ -e "$picture" ] && [ "$(cksum <"$picture")" != "$(cat "$mark" 2>/dev/null)" ]; then
    kept="${picture%.png}-kept-$(date +%Y%m%d%H%M%S).png"
    mv "$picture" "$kept"
    echo "$picture was not made by this demo: it is now $kept" >&2
fi

python skills/ai/image/alicloud-ai-image-zimage-turbo/scripts/generate_image.py \
  --request '{"prompt":"a fishing scene at dawn, cinematic, realistic","size":"1024*1024"}' \
  --output output/ai-image-zimage-turbo/images/fishing.png --print-response --overwrite >"$work/response"
cksum <"$picture" >"$mark"
cat "$work/response"

echo
echo "image:    $(field response image_path)"
echo "evidence: $(field response evidence_path)"
echo "This picture is a MOCK, drawn by the mock service on this machine: no model made it and nothing was paid."
echo "A real one: set DASHSCOPE_API_KEY and run the command of the README."
