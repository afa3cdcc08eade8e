"""Fields of a request that servers know, beside those that DiRotQ sets itself.

OpenAI's and other hosted ones, then those of vLLM, SGLang and Ollama. Anything else is refused: it
is a mistake, or a key, and fields stand in the recipe of an artifact that people pass on.
"""

__all__ = ["FIELDS"]

_WORDS = """
add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template
chat_template_kwargs continue_final_message custom_params ebnf echo enable_thinking format
frequency_penalty guided_choice guided_decoding_backend guided_grammar guided_json guided_regex
ignore_eos include_stop_str_in_output json_schema keep_alive length_penalty logit_bias logprobs
lora_path max_completion_tokens metadata min_p min_tokens mm_processor_kwargs modalities models
n no_stop_trim options plugins prediction presence_penalty priority prompt_cache_retention
provider reasoning reasoning_effort regex repetition_penalty request_id response_format route
safety_identifier safety_settings seed separate_reasoning service_tier skip_special_tokens
spaces_between_special_tokens stop stop_token_ids store stream_reasoning structured_outputs
think thinking thinking_budget top_k top_logprobs top_p transforms truncate_prompt_tokens user
verbosity vllm_xargs
"""
FIELDS = frozenset(_WORDS.split())
