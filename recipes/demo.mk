# The first thing to try: serve the embedded SmolLM2-135M-Instruct, bench it over HTTP, show the figures.
# About a minute on two cores once everything is installed. The artifact is the bench's JSON; `make demo` again
# only shows it, unless the code has changed since.

DEMO := $(OUT)/demo
DEMO_FLAGS ?= --num-prompts 32 --request-rate 4 --random-input-len 128 --random-output-len 64

.PHONY: demo
demo: $(DEMO)/bench.json  ## Serve the embedded model, bench it, print a table
	$(BIN)/llmtool bench --show $<
	@echo "Report: $(DEMO)/bench.html"

$(DEMO)/bench.json: $(STAMP) $(shell find llmtool kernels -name '*.py' -o -path '*/csrc/*.*')
	@mkdir -p $(DEMO)
	recipes/with-server.sh $(DEMO)/server.log $(BIN)/llmtool serve -- \
		$(BIN)/llmtool bench $(DEMO_FLAGS) \
		--ignore-eos --output $@ --html $(DEMO)/bench.html > /dev/null
