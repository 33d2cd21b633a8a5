#!/usr/bin/env bash
export PYTHONUNBUFFERED=1
OUT=${OUT:-.}
here=$PWD
tiles="stream_channels96 stream_channels16 stream_channels8 images_n8c4 images_n8c8 images_nhwc_n8c16 strips7 strips7_nhwc images_fma weight_x4g4_queue weight_x8g8_queue weight_c4q4_queue weight_c2q4_queue weight_stream64 weight_stream32 weight_images16 weight_images8 weight_strips weight_strips_nhwc_deep"
for v in once normal plainstore; do
  rm -rf /tmp/$v; mkdir /tmp/$v; cp -r *.py *.json *.toml kernels tests results /tmp/$v/
done
sed -i 's/L2::evict_first/L2::evict_normal/' /tmp/normal/kernels/ptx.cuh
sed -i 's/__stcs(reinterpret_cast<Word\*>(pointer), bits.word)/*reinterpret_cast<Word*>(pointer) = bits.word/' /tmp/plainstore/kernels/vector.cuh
go() { (cd /tmp/$1; timeout 80 python3 bench.py --case $2 --dtype $3 --variants $tiles --json "$OUT/$1.json" > "$OUT/$1.log" 2>&1; tail -1 "$OUT/$1.log"); }
go once "kb82 mbv2_112 mbv2_56 mbv2_7 effnet_28k5 effnet_56k5s2 effnet_14k5 convnext_56" "float16 float32"
go normal "kb82 mbv2_112 mbv2_56 mbv2_7 effnet_28k5 effnet_56k5s2 effnet_14k5 convnext_56" "float16 float32"
go plainstore "mbv2_112 mbv2_56 effnet_28k5 effnet_56k5s2 convnext_56" "float16"
