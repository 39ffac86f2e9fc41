"""Words for stories, questions and tools, and invented names."""

from __future__ import annotations

from random import Random


def listed(words: str) -> tuple[str, ...]:
    """Split a text of words, or groups of words, at its commas."""
    return tuple(words.split(","))


GIRLS = listed("Mia,Anna,Lily,Emma,Nora,Zoe,Ella,Clara,Ida,Maya,Lucy,Rosa,Sara,Alice,Eva,Nina,Lena,Ruth,Vera,Tara")
BOYS = listed("Tom,Ben,Max,Leo,Sam,Jack,Finn,Oscar,Hugo,Paul,Noah,Adam,Peter,Karl,Eric,Luis,Omar,Ivan,Felix,Theo")
PETS = listed(
    "Pip,Momo,Tiko,Bella,Rufus,Daisy,Coco,Biscuit,Pepper,Milo,Nutmeg,Poppy,Teddy,Ziggy,Luna,Olive,Toby,Kiki"
)
ANIMALS = listed(
    "fox,bear,rabbit,mouse,cat,dog,owl,hedgehog,squirrel,duck,frog,turtle,horse,pony,cow,sheep,goat,lamb,pig,hen,"
    "rooster,goose,swan,crow,sparrow,robin,parrot,eagle,penguin,seal,whale,dolphin,fish,crab,octopus,snail,bee,ant,"
    "butterfly,ladybug,spider,wolf,deer,moose,badger,beaver,mole,bat,lion,tiger,elephant,giraffe,zebra,monkey,"
    "kangaroo,koala,camel,donkey,hamster,kitten,puppy,bunny,lizard,snake,crocodile,hippo,rhino,raccoon,bird,"
    "dragon,unicorn,robot,giant,witch,wizard,ghost,monster,king,queen,prince,princess,pirate,knight,fairy,farmer,"
    "baker,sailor,teacher,painter"
)
HELPERS = listed("owl,crow,mouse,hedgehog,squirrel,turtle,robin,frog,bee,deer,badger,goose,cat,dog,duck,mole")
# Subjects of stories that are things.
THINGS = listed(
    "boat,kite,balloon,train,lantern,clock,teapot,umbrella,bicycle,candle,drum,bell,key,hat,boot,chair,lamp,cup,"
    "spoon,pencil,book,toy,snowman,star,cloud,leaf,stone,tree,flower,apple,pumpkin,shell,feather,button,letter,map,"
    "tractor,bus,car,rocket"
)
# Subjects that are in no training text, for tests.
UNSEEN = ("otter", "panda", "walrus", "goldfish", "tram", "violin")
BELONGINGS = listed(
    "ball,red ball,blue hat,kite,key,golden key,map,drum,bell,scarf,green scarf,book,lantern,basket,whistle,"
    "little mirror,umbrella,blanket,wooden spoon,silver button,shell,feather,toy boat,flute,compass"
)
PLACES = listed(
    "forest,river,old bridge,lake,hill,meadow,garden,mill,cave,village,beach,pond,market,tall oak,apple tree,"
    "lighthouse,barn,castle,field,waterfall"
)
TRAITS = listed("small,little,young,brave,shy,kind,clever,old,happy,curious,quiet,lazy,sleepy,tiny,friendly")
CITIES = listed(
    "Oslo,Paris,London,Rome,Berlin,Madrid,Vienna,Prague,Warsaw,Dublin,Lisbon,Athens,Helsinki,Stockholm,Copenhagen,"
    "Brussels,Amsterdam,Budapest,Bergen,Hamburg,Munich,Milan,Naples,Turin,Venice,Lyon,Nice,Marseille,Toulouse,"
    "Seville,Valencia,Porto,Geneva,Basel,Zurich,Bern,Krakow,Riga,Tallinn,Vilnius,Kyiv,Minsk,Sofia,Belgrade,Zagreb,"
    "Tokyo,Kyoto,Osaka,Seoul,Beijing,Shanghai,Hong Kong,Hanoi,Bangkok,Manila,Jakarta,Singapore,Delhi,Mumbai,"
    "Chennai,Dhaka,Karachi,Lahore,Kabul,Tehran,Baghdad,Dubai,Doha,Cairo,Tunis,Algiers,Rabat,Dakar,Accra,Lagos,"
    "Nairobi,Kampala,Kigali,Lusaka,Harare,Pretoria,Cape Town,Durban,Sydney,Melbourne,Perth,Brisbane,Adelaide,"
    "Auckland,Wellington,Toronto,Montreal,Ottawa,Vancouver,Calgary,New York,Boston,Chicago,Denver,Dallas,Houston,"
    "Austin,Seattle,Portland,San Diego,Miami,Atlanta,Detroit,Mexico City,Havana,Panama City,Bogota,Quito,Lima,"
    "La Paz,Santiago,Buenos Aires,Montevideo,Brasilia,Recife,Salvador"
)
ACCENTED = listed(
    "Zürich,São Paulo,Malmö,Tromsø,Łódź,Córdoba,Málaga,Kraków,Genève,Düsseldorf,Köln,München,Göteborg,Århus,"
    "Bogotá,Medellín,Brasília,Orléans,Besançon,Münster,Nürnberg,Linköping,Jönköping,Poznań,Gdańsk,Cádiz,León"
)
# Cities that are in no training text, for tests.
UNSEEN_CITIES = listed(
    "Reykjavik,Ljubljana,Bratislava,Edinburgh,Barcelona,Istanbul,Nuuk,Philadelphia,Casablanca,Bordeaux,"
    "Gothenburg,Salzburg"
)

_BEGINNINGS = listed("b,bl,br,c,ch,d,dr,f,fl,g,gr,h,j,k,kl,l,m,n,p,pl,qu,r,s,sh,sk,st,t,tr,v,w,y,z,,,")
_MIDDLES = listed("a,e,i,o,u,aa,ei,ou,ia,ay,oo")
_ENDINGS = listed("n,r,l,s,t,m,k,rd,ng,x,nd,sk,lm,th,ck,,,,,,,,,,,,")
_ACCENTS = (
    ("a", "ä"),
    ("o", "ö"),
    ("u", "ü"),
    ("a", "å"),
    ("o", "ø"),
    ("e", "é"),
    ("a", "á"),
    ("o", "ó"),
    ("i", "í"),
)


def made_up(random: Random) -> str:
    """Return an invented word of two or three syllables, such as "tralou". The model has to copy it."""
    while True:
        syllables = (
            random.choice(_BEGINNINGS) + random.choice(_MIDDLES) + random.choice(_ENDINGS)
            for _ in range(random.choice((2, 2, 2, 3)))
        )
        word = "".join(syllables)
        if word not in UNSEEN and word.capitalize() not in UNSEEN_CITIES:
            return word


def city(random: Random, *, strange: bool = False) -> str:
    """Return a real or an invented city; if `strange`, possibly with letters that English lacks."""
    if strange and random.random() < 0.35:
        name = random.choice((random.choice(ACCENTED), made_up(random).capitalize()))
        return name.replace(*random.choice(_ACCENTS)) if name.isascii() else name
    if random.random() < 0.5:
        return random.choice(CITIES)
    name = made_up(random).capitalize()
    if random.random() < 0.25:
        name += random.choice(("ville", "burg", "ton", "stad", "vik", "ford", " Bay", " Hill"))
    return name
