"""Names of the files in a bundle that are there for onnxruntime-genai alone."""

CONFIG = "genai_config.json"
TEXT = "text.onnx"  # ids to logits; refers to the bundle's data files, as all the others
AUDIO_OVERLAY = "genai_audio.json"  # what differs in the configuration for a model that hears
DECODER = "genai_decoder.onnx"
EMBEDDINGS = "genai_embeddings.onnx"  # puts soft tokens in place of placeholders
NO_IMAGES = "genai_no_images.onnx"  # the image session that genai asks for
SOFT_TOKENS = "genai_soft_tokens.onnx"  # in place of the audio encoder, if soft tokens are given
