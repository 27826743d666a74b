# Pruning, from weights to a served small model: the embedded SmolLM2-135M loses a fifth of its attention and MLP
# parameters, label-free, and is served. A few minutes on two cores.

PRUNED := $(OUT)/prune
PRUNE_FLAGS ?= --params 0.8 --samples 128

.PHONY: prune
prune: $(PRUNED)/report.json  ## Prune the embedded model, serve the small one, bench it
	recipes/with-server.sh $(OUT)/prune-server.log $(BIN)/llmtool serve $(PRUNED)/model -- \
		$(BIN)/llmtool bench --num-prompts 8 --random-input-len 64 --random-output-len 32 --ignore-eos

$(PRUNED)/report.json: $(STAMP) $(shell find llmtool/prune -name '*.py')
	rm -rf $(PRUNED)
	$(BIN)/llmtool prune smollm2-135m $(PRUNE_FLAGS) --output $(PRUNED)
