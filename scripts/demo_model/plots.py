"""The plots of stories: for persons and animals, and for things.

`stories` fills in the values in braces: {name} is the subject after its first
mention, {he} and {his} are its pronouns, {helper} is the helper it meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Steps = Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Plot:
    """The steps of a plot, and the ways a request can ask for it after its subject."""

    steps: Steps
    asked: Sequence[str] = ()


_LOST = Plot(
    (
        (
            "One [morning|day|evening], {name} could not find {his} {thing}.",
            "One [windy|sunny|rainy] day {name} lost {his} {thing}.",
        ),
        (
            "{He} looked [under the bed|behind the door|in every corner], but it was not there.",
            "{He} searched [the house|the garden|everywhere], but the {thing} was gone.",
        ),
        ("On the path {he} met {a_helper}.", "Then {a_helper} came by.", "So {he} went out and asked {a_helper}."),
        ('"Have you seen my {thing}?" asked {name}.', '"I have lost my {thing}," said {name}. "Can you help me?"'),
        (
            '"I saw it by the {place}," said the {helper}.',
            '"Yes," said the {helper}, "it is near the {place}. Come with me!"',
        ),
        (
            "Together they went to the {place}, and there it was, [under a leaf|in the grass|behind a stone].",
            "They ran to the {place} and found the {thing} [in the grass|under a bush|between two stones].",
        ),
        (
            "{Name} [laughed|danced|jumped] for joy and thanked the {helper}.",
            "{Name} was so happy that {he} [sang all the way home|gave the {helper} a big hug].",
        ),
        (
            "From that day on, {name} took good care of the {thing}.",
            "After that, {name} and the {helper} were best friends.",
        ),
    ),
    ("who lost {his} {thing}", "who cannot find {his} {thing}", "and a lost {thing}", "and a {helper}"),
)
_STORM = Plot(
    (
        (
            "One [day|evening] dark clouds came over the {place}, and it began to rain.",
            "One [night|afternoon] a big storm came to the {place}.",
        ),
        ("The wind [howled|blew hard] and {name} was [cold and wet|afraid].",),
        ("{He} ran to find a dry place, but every door was shut.", "{He} looked for a place to hide."),
        (
            'Then {a_helper} called: "Come in, there is room for two!"',
            'At last {he} saw a light. It was the home of {a_helper}. "Come in," said the {helper}.',
        ),
        (
            "They sat by the fire and drank hot [tea|soup|milk].",
            "Inside it was warm, and they told each other [stories|jokes] until the storm was over.",
        ),
        (
            "In the morning the sun was shining, and a rainbow stood over the {place}.",
            "When the sun came back, everything was [bright|green|clean] and new.",
        ),
        (
            "{Name} thanked the {helper} and was never afraid of a storm again.",
            "{Name} had found a friend, and that was better than good weather.",
        ),
    ),
    ("in a storm", "in the rain", "and the storm", "and a {helper}"),
)
_LONELY = Plot(
    (
        (
            "{Name} had no friends and was often [sad|lonely].",
            "{Name} played alone every day, and that was [sad|no fun].",
        ),
        (
            "One day {he} heard somebody cry near the {place}.",
            "One morning {he} walked to the {place} and saw somebody there.",
        ),
        ("It was {a_helper} who was lonely, too.", "It was {a_helper} who had nobody to play with."),
        ('"Do you want to play with me?" asked {name}.', '"Shall we be friends?" asked {name}.'),
        ('"Oh yes!" said the {helper}.', 'The {helper} smiled and said: "I would love to."'),
        (
            "They played [by the water|in the grass|hide and seek] until [the sun went down|the stars came out].",
            "They [built a little house|picked berries|flew a kite] together the whole day.",
        ),
        ("From then on, {name} was never lonely again.", "Now {name} had a friend, and every day was a good day."),
    ),
    ("who was lonely", "who had no friends", "who finds a friend", "and a {helper}"),
)
_SKILL = Plot(
    (
        ("{Name} wanted to learn to {skill}.", "More than anything, {name} wished to {skill}."),
        (
            "The first time {he} tried, it went all wrong, and everybody laughed.",
            "{He} tried it on Monday, but it did not work.",
            "{He} tried and tried, but it was too hard.",
        ),
        (
            '"I will never learn it," said {name} and sat down by the {place}.',
            '{Name} felt sad and thought: "I can not do it."',
        ),
        (
            '{A_helper} heard this and said: "Try once more. I will show you how."',
            'But {a_helper} said: "Nobody can do it on the first day. Let us try together."',
        ),
        ("So they practised every [day|morning|evening].", "Day after day, {name} practised with the {helper}."),
        (
            "At last, one [sunny|quiet|fine] morning, {name} could {skill}!",
            "And then, one day, it worked: {name} could {skill}!",
        ),
        (
            "{Name} was proud, and the {helper} was proud, too.",
            "Everybody clapped, and {name} had learned that one must not give up.",
        ),
    ),
    ("who wants to {skill}", "who learned to {skill}", "who could not {skill}"),
)
_HELP = Plot(
    (
        (
            "One day {name} was walking by the {place} when {he} heard a small voice.",
            "On a [cold|warm|sunny] morning {name} went for a walk to the {place}.",
        ),
        (
            "{A_helper} had fallen into a hole and could not get out.",
            "There sat {a_helper} who had lost the way home.",
        ),
        ('"Please help me!" said the {helper}.', '"Can you help me?" asked the {helper}.'),
        ('"Do not worry," said {name}, "I am here."', '{Name} thought for a moment and said: "I know what to do."'),
        (
            "{He} took {his} {thing} and used it to help the {helper}.",
            "{Name} worked hard, and soon the {helper} was safe.",
        ),
        (
            "The {helper} was so glad that they [had a picnic|shared a cake|sang a song] together.",
            '"Thank you, you are very kind," said the {helper}.',
        ),
        ("{Name} went home with a warm heart.", "That night {name} slept well, because it is good to help others."),
    ),
    ("who helps {a_helper}", "who is kind", "and {a_helper}"),
)
_JOURNEY = Plot(
    (
        ("{Name} had never seen {dream}, and {he} wanted to go there.", "Every night {name} dreamed of {dream}."),
        (
            "So one morning {he} packed [some bread and an apple|a small bag|{his} {thing}] and left.",
            "One day {he} said goodbye and set out.",
        ),
        (
            "{He} walked past the {place} and [through the fields|over three hills|along the road].",
            "The way was long, and {he} had to cross the {place}.",
        ),
        (
            "When {he} was tired, {a_helper} gave {him} [water|something to eat|a place to sleep].",
            "On the way {he} met {a_helper}, and they went on together.",
        ),
        (
            "On the [third|fifth|seventh] day {he} stood still: there was {dream}!",
            "At last {he} saw {dream}, and it was more beautiful than in any dream.",
        ),
        ("{Name} stayed there until the sun went down.", '"The world is big and wonderful," said {name}.'),
        (
            "Then {he} went home and told everyone about it.",
            "When {he} came home, {he} had a story to tell for every evening of the year.",
        ),
    ),
    ("who wants to see {dream}", "who dreams of {dream}", "and {dream}"),
)
_RACE = Plot(
    (
        (
            "One day there was a big race from the {place} to the [mill|lake|old wall].",
            "Every summer there was a race around the {place}.",
        ),
        ('"You are too slow," the others said to {name}.', "Nobody thought that {name} could win."),
        ("But {name} wanted to try.", 'But {name} only smiled and said: "We will see."'),
        (
            "At the start everyone ran fast, and {name} was the last.",
            "The race began, and soon {name} was far behind.",
        ),
        (
            "Then {he} saw {a_helper} who had hurt a foot, and {he} stopped to help.",
            "Half way, {a_helper} fell down, and only {name} stopped.",
        ),
        (
            "They came in last, arm in arm, but everybody cheered.",
            "So {name} did not win the race, but {he} won a friend.",
        ),
        (
            "In the evening {name} got a medal for the kindest heart.",
            '"That was the best race of my life," said {name}.',
        ),
    ),
    ("in a race", "who runs a race", "who wants to win a race"),
)
_GIFT = Plot(
    (
        (
            "It was the birthday of {his} friend, {a_helper}, and {name} had no gift.",
            "{Name} wanted to give a present to {his} friend, {a_helper}.",
        ),
        ("{He} had no money, so {he} thought for a long time.", '"What could I give?" {he} thought.'),
        (
            "Then {he} took {his} own {thing} and cleaned it until it shone.",
            "Then {he} sat down and made a {thing} with {his} own hands.",
        ),
        (
            "In the evening {name} went to the {place}, where the party was.",
            "At the party by the {place} there was [music|cake|dancing] for all.",
        ),
        (
            'The {helper} opened the gift and said: "A {thing}! I have always wanted one."',
            'The {helper} looked at the {thing} and smiled. "This is the best gift of all."',
        ),
        ("{Name} was happier than if {he} had got a gift.", "They ate cake and danced until midnight."),
        ("A gift need not be big, if it comes from the heart.", "And {name} fell asleep with a smile."),
    ),
    ("and a birthday", "who makes a gift", "and a present"),
)
_NOISE = Plot(
    (
        ("One night {name} woke up because of a strange noise.", "It was dark, and {name} heard a noise outside."),
        ('"Is it a monster?" thought {name}.', "{His} heart beat fast, and {he} hid under the blanket."),
        (
            "But the noise did not stop, so {he} took {his} {thing} and went to look.",
            "Then {he} took a deep breath and opened the door.",
        ),
        ("Step by step {he} went to the {place}.", "The moon shone on the {place}, and something moved there."),
        (
            "It was only {a_helper} who was [snoring|singing|eating nuts]!",
            "There sat {a_helper} who could not sleep either.",
        ),
        ("They both had to laugh.", '"I am sorry," said the {helper}. "I did not want to wake you."'),
        (
            "They looked at the stars together until they were tired.",
            "{Name} made some [tea|warm milk] for the two of them.",
        ),
        (
            "After that, {name} was not afraid of the dark anymore.",
            "Then {name} went back to bed and slept until morning.",
        ),
    ),
    ("who is afraid of the dark", "and a strange noise", "at night"),
)
_SEED = Plot(
    (
        ("One spring day {name} found a seed near the {place}.", "{A_helper} gave {name} a small seed."),
        ("{He} put it into the ground and gave it water every day.", "{He} planted it in the garden and waited."),
        ("For a long time nothing happened.", "After a week there was still nothing to see."),
        ('"Be patient," said {a_friend}.', "But {name} did not give up."),
        (
            "Then, one morning, there was a green leaf.",
            "One day, after the rain, something small and green came out.",
        ),
        (
            "It grew and grew, until it was a [tall sunflower|big tree|pumpkin as big as a house].",
            "By the summer it was full of [red flowers|sweet berries|apples].",
        ),
        (
            "{Name} shared it with everyone, and they had a feast.",
            "{Name} invited all {his} friends, and they sat in its shade.",
        ),
        ("And {he} kept one seed for the next spring.", "So {name} learned that good things take time."),
    ),
    ("who plants a seed", "and a garden", "and a seed", "in a garden"),
)
SOMEBODY = (_LOST, _STORM, _LONELY, _SKILL, _HELP, _JOURNEY, _RACE, _GIFT, _NOISE, _SEED)

_FORGOTTEN = Plot(
    (
        (
            "For many years it lay in [an attic|a cellar|an old box], and nobody thought of it.",
            "It was [dusty|broken] and forgotten.",
        ),
        ("{Name} was sad and waited for somebody to come.", '"Will anybody ever need me again?" thought {name}.'),
        ("One day a [girl|child] named {child} found it.", "Then, on a rainy day, {child} opened the door."),
        ('"What a beautiful {kind}!" said {child}.', '"Look, {a_kind}!" cried {child}.'),
        ("{child} cleaned {name} until it shone like new.", "{child} worked the whole day to mend {name}."),
        (
            "Soon everybody in the village wanted to see {name}.",
            "From now on, {child} and {name} were always together.",
        ),
        ("And {name} was the happiest {kind} in the world.", "{Name} was never forgotten again."),
    ),
    ("that was forgotten", "in an attic", "and a child"),
)
_TRAVEL = Plot(
    (
        (
            "It dreamed of {dream}, but it had never been anywhere.",
            '"I wish I could see {dream}," said {name} every evening.',
        ),
        ("One day a strong wind came and took it away.", "One morning {a_helper} picked it up and carried it off."),
        ("It went over the {place} and far beyond.", "They passed the {place} and many roofs."),
        ('"Where are you going?" called {a_friend}.', "Down there the houses were as small as toys."),
        ('"To {dream}!" said {name}.', "{Name} had never been so happy."),
        ("In the evening it saw {dream}, golden in the last light.", "And there it was: {dream}!"),
        (
            "A child named {child} found {name} and brought it home.",
            "A sailor took {name} home again and told the story to all.",
        ),
        ("Now {name} stands at the window and remembers.", "Since then {name} has dreamed of the next journey."),
    ),
    ("that wants to see {dream}", "that travels", "and {dream}"),
)
_USEFUL = Plot(
    (
        (
            "All the others were bigger, and nobody needed such a {trait} {kind}.",
            '"You are no use," the others said to {name}.',
        ),
        ("That made {name} sad.", "{Name} said nothing and waited."),
        (
            "Then, one [dark|cold|windy] night, {child} got lost near the {place}.",
            "One winter evening {a_helper} came and asked for help.",
        ),
        ('"Who can help?" everybody asked.', "The big ones were all asleep."),
        ('"I can," said {name}.', "{Name} did not wait, and went at once."),
        (
            "It was not easy, but before the morning everything was well.",
            "And because it was so {trait}, it could do what no other could.",
        ),
        ("After that, nobody laughed at {name} again.", "Since that night everybody is proud of {name}."),
    ),
    ("that nobody needs", "that helps", "that saves the day"),
)
SOMETHING = (_FORGOTTEN, _TRAVEL, _USEFUL)
