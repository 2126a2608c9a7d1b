"""The tokenizer of models without free text, which the text-to-audio pipeline wants all the same."""

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Strip
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast


def label_tokenizer(labels: list[str] | None = None) -> PreTrainedTokenizerFast:
    """
    Tokenizer whose tokens are whole label names, separated by semicolons; ids are the labels' indices.

    Args:
        labels (`list[str]`, *optional*): the names; without them every text becomes unknown tokens.
    """
    vocabulary = {name: index for index, name in enumerate([*(labels or []), "[PAD]", "[UNK]"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = Strip()
    tokenizer.pre_tokenizer = Split(Regex(r"\s*;\s*"), behavior="removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )
