"""The language of the documents, the docstrings, the help and the messages, within limits."""

import pytest

from tools import language
from tools.language import Text

DOCUMENTS = language.documents()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_sentences_are_short(name):
    assert language.words_a_sentence(DOCUMENTS[name]) <= language.LONGEST


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_avoid_words_that_are_hard_to_read(name):
    assert not language.avoided([Text(name, language.prose(DOCUMENTS[name]))])


@pytest.mark.parametrize("texts", [language.helps, language.messages])
def test_help_and_messages_avoid_words_that_are_hard_to_read(texts):
    assert not language.avoided(texts())


def test_docstrings_of_functions_begin_with_verbs():
    found = list(language.docstrings())
    asking = [text.place for text, is_function in found if is_function and text.text.startswith(language.QUESTIONS)]
    assert len(found) > 500 and not asking
    assert sum(language.begins_with_verb(text.text) for text, _ in found) > 0.98 * len(found)


def test_sentences_are_counted_without_code_tables_and_headings():
    document = """# A heading

One `python -m program --flag` has [three words](page.md#there). Four words (et al. 2020) here!

```shell
python -m program with many words
```

| a table | of cells |

* a point of
  five words
* and one of six words
"""
    assert [language.count_words(sentence) for sentence in language.sentences(document)] == [5, 6, 5, 5]
    assert language.words_a_sentence(document) == 21 / 4


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Print it and leave.", "and leave"),
        ("SHARE, 0 to 1", "SHARE"),
        ("it is Left\nout", "Left\nout"),
        ("None of them is", None),
        ("to share images", None),
    ],
)
def test_words_are_found(text, word):
    assert language.avoided([Text("here", text)]) == ([] if word is None else [f"here: {word!r}"])


def test_messages_are_the_texts_of_a_program_without_docstrings():
    program = 'def f(x):\n    """Do it."""\n    raise ValueError(f"{x} is told")\n'
    assert [(text.place, text.text) for text in language.messages_of(program, "f.py")] == [("f.py:3", " is told")]
