"""Invented devices, rooms, people and phrases for the slots that the Home Assistant grammar leaves open."""

import itertools
import random
from collections.abc import Sequence

UNSEEN = 0.5  # how often a held-out split fills a slot with a value that train never has

# The grammar leaves names to the user's home. A device is a modifier and a noun, and the noun tells the
# domain: whether "set X to 20" means degrees or brightness must be readable from the command. So no
# noun is shared between domains, and none is a word of the grammar ("lamp", "door", "fan").
MODIFIERS = """corner,reading,oak,brass,antique,tall,small,left,right,front,rear,main,spare,vintage,wooden,glass,
copper,ivory,marble,bamboo,velvet,retro,nordic,round,square,narrow,bedside,desk,shelf,wall,fireplace,
piano,window seat,christmas,guest,family,grandma,charlie,olivia,hugo,felix,nina,oscar,panda,dragon,
unicorn,smart,portable,travel,north,south,east,west,crystal,rustic,tiny,giant,sleepy,lucky,old town,
winter,summer,weekend,holiday,morning,midnight"""
NOUNS = {
    "light": "chandelier,lantern,spotlight,sconce,led strip,downlighter,bulb,floodlight,nightlight",
    "switch": "outlet,socket,kettle,coffee machine,humidifier,charger,aquarium,toaster",
    "fan": "ventilator,air purifier,extractor,blower,air circulator",
    "media_player": "speaker,television,radio,soundbar,stereo,record player,projector,jukebox",
    "cover": "roller,drapes,skylight,hatch,pergola,canopy,sunscreen",
    "lock": "padlock,deadbolt,safe,latch,strongbox,cabinet",
    "valve": "sprinkler,faucet,hydrant,water main,irrigation",
    "climate": "thermostat,heat pump,air conditioner,radiator,boiler",
    "sensor": "thermometer,hygrometer,power meter,rain gauge",
    "binary_sensor": "motion sensor,contact sensor,leak detector,mailbox,beam detector",
    "input_boolean": "away flag,helper,schedule",
    "vacuum": "roomba,sweeper,robot,dust buster",
    "lawn_mower": "trimmer,grass cutter,automower",
    "scene": "ambience,mood,sunset,glow",
    "script": "routine,sequence,procedure",
    "button": "buzzer,chime,siren",
    "input_button": "trigger,pusher",
    "todo": "chores,errands,wishlist,groceries,packing",
}
PLACES = """kitchen,living room,bedroom,guest bedroom,master bedroom,nursery,bathroom,guest bathroom,dining room,
hallway,entryway,office,home office,study,library,laundry room,utility room,pantry,cellar,workshop,
garden shed,greenhouse,patio,balcony,terrace,backyard,front yard,garden,pool house,sauna,gym,game room,
music room,sunroom,conservatory,den,lounge,foyer,mudroom,wine cellar,tool shed,stairwell,playroom,sewing
room,breakfast nook,closet,powder room,corridor,studio,carport,boat house,kids room,gallery,dressing
room,orchard,barn,hobby room,prayer room,cinema,veranda"""
PEOPLE = """anna,ben,carla,david,elena,frank,greta,henry,isabel,jack,karen,liam,maria,noah,paula,quentin,rosa,
simon,tessa,victor,wanda,yusuf,zoe,amir,beatrice,dimitri"""
CITIES = """paris,berlin,new york,oslo,madrid,san diego,tokyo,lima,dublin,cape town,vienna,prague,boston,rome,
lisbon,helsinki,mexico city,warsaw,geneva,nairobi,buenos aires,sydney,toronto,cairo"""
FLOORS = "ground,first,second,third,fourth,upper,upstairs,downstairs,basement,attic,mezzanine,loft"
ZONES = """work,school,university,supermarket,airport,train station,football club,hospital,church,market,dentist,
beach,museum,town hall,farm,harbor,campus,bakery,post office,stadium,zoo,theater,hotel,bus stop"""
# Free text is a start and an end too, so that no list of whole phrases can be learned by heart.
PHRASES = {
    "message": (
        "dinner,the pizza,the taxi,breakfast,the movie,our guest,the plumber,the bus,lunch,the meeting,the dog",
        "is ready,is here,has arrived,starts soon,is waiting outside,will be late,is almost done",
    ),
    "search_query": (
        "golden,silent,electric,broken,hidden,burning,frozen,purple velvet,lonely,secret,wild,paper,neon,distant,crazy",
        "river,hearts,thunder,dreams,planet,mountain,shadows,horses,garden of stone,highway,ocean,wolves,letters,fever",
    ),
    "timer_name": (
        "pizza,pasta,egg,laundry,homework,bread,tea,cookie,chicken,rice,yoga,workout,nap,cake,potato,soup,game,piano,bath",
        ",break,practice,time",
    ),
    "timer_command": (
        "call,feed,remind,text,wake up,check on,greet,pick up,visit,wave at",
        "the dog,grandpa,the neighbors,my sister,the plumber,the baby,our teacher,the cat",
    ),
    "item": (
        "fresh,frozen,organic,cheap,red,large,sliced,dried,smoked,raw,two,half a dozen,a box of,a bag of,some",
        "apples,milk,bread,onions,cheese,batteries,rice,coffee beans,tomatoes,eggs,noodles,paper towels,dog food,honey",
    ),
}


def _words(text: str) -> list[str]:
    return [" ".join(word.split()) for word in text.split(",")]


class Home:
    """Invented names for what the grammar leaves open, in a part per split that only it may use."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"{seed}/home")
        modifiers = _words(MODIFIERS)
        rng.shuffle(modifiers)  # one order for all domains: a held-out modifier is new everywhere
        self.parts: dict[str, dict[str, list[str]]] = {}
        for domain, nouns in NOUNS.items():
            self._add(domain, modifiers, _words(nouns))
        for key, text in (("person", PEOPLE), ("weather", CITIES), ("area", PLACES), ("zone", ZONES)):
            self._add(key, rng.sample(_words(text), len(_words(text))))
        self.parts["floor"] = {"train": _words(FLOORS), "validation": [], "test": []}  # a closed class
        for key, (starts, ends) in PHRASES.items():
            self._add(key, rng.sample(_words(starts), len(_words(starts))), _words(ends))
        self.parts["todo_list_item"] = self.parts["shopping_list_item"] = self.parts.pop("item")

    def _add(self, key: str, starts: list[str], ends: Sequence[str] = ("",)) -> None:
        cut = max(1, len(starts) // 6)
        share = {"validation": starts[:cut], "test": starts[cut : 2 * cut], "train": starts[2 * cut :]}
        self.parts[key] = {
            split: [f"{start} {end}".strip() for start, end in itertools.product(words, ends)]
            for split, words in share.items()
        }

    def draw(self, rng: random.Random, key: str, split: str) -> str:
        own = self.parts[key][split]
        return rng.choice(own if own and rng.random() < UNSEEN else self.parts[key]["train"])
