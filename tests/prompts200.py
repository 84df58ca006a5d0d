"""200 prompts that are hard on a tokenizer: accents, emoji, quotes, the empty prompt, more than 77 tokens, other scripts,
special tokens."""

import random

HARD = (
    "",
    " ",
    " \t\n ",
    "hello! wow!! a photo",
    "!",
    "a <|endoftext|> b <|ENDOFTEXT|>c<|startoftext|>x",
    "<|endoftext|>",
    "Ünïcode’s  naïve\tcafé",
    "e\u0301 and é",
    "\ufb01 ligature ß ẞ İ ı Ǆ",
    "🎉 party 👩‍👩‍👧‍👦 family 🇫🇷 flag",
    "🎉" * 60,
    "word " * 200,
    "antidisestablishmentarianism" * 20,
    "\"double\" 'single' it's they'll I'd we'RE you've I'm can't `tick` «guillemets» “curly”",
    "12345 a1b2 3.14 1,000,000 ½ ² Ⅻ",
    "<b>html &amp; entities</b> &quot;x&quot;",
    "line\r\nbreak\u2028separator\u00a0space\u200bzero",
    "\x00\x01 control \x7f",
    "?!? ... --- ___ /// \\\\ ||| ~~~ ^^^",
    "日本語のプロンプト、写真",
    "नमस्ते مرحبا שלום Привет Γειά",
    "Björk's Vulnicura, on Spotify",
    "Prince Reunites With Warner Brothers, Plans New Album",
    "The Happy Scientist & co. (S02E05) #podcast @home 50% off €5",
)


def _random_prompts(count: int) -> list[str]:
    numbers = random.Random(0)
    letters = "abcXYZ éßñ'\"!<|>.,0123-_🎉日本\t"
    words = "a photo of the Red circle on green wall, modified prompt for your neighbours' DOG it's 1987".split()
    made = []
    for index in range(count):
        if index % 2:
            made.append("".join(numbers.choice(letters) for _ in range(numbers.randint(0, 150))))
        else:
            made.append(" ".join(numbers.choice(words) for _ in range(numbers.randint(1, 30))))
    return made


PROMPTS = (*HARD, *_random_prompts(200 - len(HARD)))
