# The whole loop on one machine: prune the embedded SmolLM2-135M, plan the small one for this CPU, serve the plan,
# bench it under the load it was made for, calibrate the planner by the result and plan again. Ten minutes on two
# cores, most of them pruning. With GPUs: LOOP_DEVICE=h100 LOOP_DEVICES=2, and the plan may have several engines.

LOOP := $(OUT)/loop
LOOP_DEVICE ?= cpu
LOOP_DEVICES ?= 1

.PHONY: loop
loop: $(STAMP)  ## Prune, plan, serve the plan, bench it, calibrate the planner
	LLMTOOL=$(BIN)/llmtool DEVICE=$(LOOP_DEVICE) DEVICES=$(LOOP_DEVICES) recipes/loop.sh $(LOOP)
