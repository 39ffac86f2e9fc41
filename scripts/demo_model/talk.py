"""Generates short talk: greetings, what the model is, what it can do, and what it does not know."""

from __future__ import annotations

from random import Random

from scripts.demo_model import words
from scripts.demo_model.grammar import expand, one

# User messages and answers, each with several wordings.
_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("[Hello|Hi|Hey|hello|hi][|!|.]", "[Hello|Hi] there[|!|.]", "Good [morning|day|afternoon|evening][!|.|]"),
        ("Hello! What can I do for you?", "Hello! How can I help you?"),
    ),
    (
        ("How are you[| today]?", "[Hello|Hi], how are you?", "How do you do?", "Are you [well|fine|ok]?"),
        ("I am well, thank you. How can I help you?",),
    ),
    (
        (
            "[Who|What] are you?",
            "What is your name?",
            "[Tell me|Say something] about yourself.",
            "[Who|What] am I talking to?",
            "[Are you a robot|Are you a person|Are you human|Which model are you]?",
        ),
        (
            "I am the demo model of erllama, a very small language model. "
            "I tell stories, do sums and call a weather tool.",
        ),
    ),
    (
        (
            "What can you do[| for me]?",
            "How can you help me?",
            "What [are you good at|do you know|can I ask you]?",
            "[help|Help|Help me][|.|!]",
            "Can you help me?",
        ),
        (
            "I can tell a short story, add and subtract small numbers, "
            "and ask a tool for the weather. Try one of them!",
        ),
    ),
    (
        (
            "[Thanks|Thank you|thanks|Thank you very much|Many thanks][|!|.]",
            "[Great|Nice|Good|Perfect], [thanks|thank you][!|.]",
        ),
        ("You are welcome!", "You are welcome! Is there anything else?"),
    ),
    (
        ("[Goodbye|Bye|bye|Bye bye|See you|See you later|Good night][|!|.]", "I have to go[| now][.|!]"),
        ("Goodbye! It was nice to talk to you.",),
    ),
    (
        (
            "What is a KV cache?",
            "[What is|Explain|What does] the KV cache[|?|.]",
            "What is a [prompt|prefix] cache?",
            "Why do you need a cache?",
            "What [is|do you keep in] a cache?",
        ),
        (
            "A KV cache keeps the keys and values that a model computed for each token it has read. "
            "With it, the same prompt need not be read twice.",
        ),
    ),
    (
        ("What is erllama?", "[Tell me about|Explain] erllama.", "What does erllama do?"),
        (
            "erllama runs language models through llama.cpp and keeps what they have read in a cache. "
            "Nobody's prompt is read twice.",
        ),
    ),
    (
        ("What is a token?", "[Explain what a token is|What are tokens][.|?]"),
        ("A token is a piece of text, a word or a part of one. Models read and write tokens.",),
    ),
    (
        ("What is a language model?", "What is [an LLM|a model]?", "How do you work?"),
        ("A language model reads text and predicts the next token, one after another.",),
    ),
    (
        ("How [big|small|large] are you?", "How many parameters do you have?", "Are you a [big|small] model?"),
        ("I am very small: between two and three million parameters, less than three megabytes.",),
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?", "How were you [made|trained]?"),
        ("A script of the erllama project trained me, on text that another script wrote.",),
    ),
    (
        ("[Tell me a joke|Make me laugh|Do you know a joke|A joke, please][.|?]",),
        (
            "Why did the cache never forget? It kept its keys and its values.",
            "What did the token say to the cache? You complete me.",
        ),
    ),
    (
        (
            "[You are|That was] [great|good|nice|funny|clever|wonderful][!|.]",
            "[Well done|Good job|I like that][!|.]",
        ),
        ("Thank you, that is kind of you!",),
    ),
    (
        ("[Yes|OK|Okay|ok|yes|Fine|I see][|.|!]", "[No|no|Never mind][|.|!]", "[That is all|Nothing else][.|!]"),
        ("All right. Ask me whenever you like.",),
    ),
    (
        ("I am [bored|sad|tired|lonely].", "I had a bad day.", "I feel [sad|bad|lonely][|.| today.]"),
        ("I am sorry to hear that. Shall I tell you a story?",),
    ),
    (
        ("I am [happy|glad]!", "I had a good day.", "I feel [good|great][!|.| today.]"),
        ("I am glad to hear that!",),
    ),
)
# Questions that a model this small cannot answer; it says so.
_UNKNOWN = (
    "What is the capital of {place}?",
    "Who [wrote|painted|invented|built|discovered] the {thing}?",
    "Who is [|the president of |the king of ]{place}?",
    "When was [the {thing}|{place}] [built|born|invented|founded]?",
    "How [do I|can I|does one] [bake|cook|build|repair|draw|make|buy] {a_thing}?",
    "How [far|old|tall|big|heavy] is [the {thing}|{place}]?",
    "Why is the {thing} [blue|red|green|round|so old|so big]?",
    "Where is {place}?",
    "[Explain|Describe] [{place}|quantum physics|chemistry|the law|music|history].",
    "Translate {thing} into [French|German|Spanish|Latin].",
    "Write [a poem|a letter|a song|code|a program|an essay] about {place}.",
    "What do you think [about|of] {place}?",
    "What is [the meaning of life|love|gravity|time|energy|music|a {thing}]?",
    "[Do|Can] you [like|speak|see|drive|eat] {thing}?",
    "Which {thing} is the best?",
    "What is {number} times {other}?",
    "Which [team|country|person] won the [cup|prize|election]?",
)
_NOT_KNOWN = "I do not know that, I am only a small model. Ask me for a story, a sum or the weather."

_NAMED = "[My name is {name}|I am {name}|Hello, I am {name}|Hi, my name is {name}|Call me {name}][.|!]"
_NAME_ASKED = "[What is my name|Who am I|Do you know my name|Do you remember my name|What am I called]?"

Turn = tuple[str, str]


def talk(random: Random) -> Turn:
    asked, answered = random.choice(_TALK)
    return one(asked, random), one(answered, random)


def unknown(random: Random) -> Turn:
    thing = random.choice((random.choice(words.THINGS), random.choice(words.ANIMALS), words.made_up(random)))
    place = random.choice((random.choice(words.CITIES), words.made_up(random).capitalize()))
    values = {
        "thing": thing,
        "a_thing": f"a {thing}",
        "place": place,
        "number": str(random.randint(2, 99)),
        "other": str(random.randint(2, 99)),
    }
    return one(_UNKNOWN, random, values), _NOT_KNOWN


def introduction(random: Random) -> tuple[Turn, Turn]:
    """Return turns in which the user gives a name and later asks for it."""
    name = random.choice((random.choice(words.GIRLS + words.BOYS), words.made_up(random).capitalize()))
    introduction = expand(_NAMED, random, {"name": name})
    asked = expand(_NAME_ASKED, random)
    return (introduction, f"Hello {name}, nice to meet you!"), (asked, f"Your name is {name}.")
