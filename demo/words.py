"""What each concept is called: words that come with training images, words that come in text only, two languages.

English words left of the bar may stand in captions of training images; those right of it (and all of Spanish and
Chinese) occur only in the text that the mini LLM reads, and in the captions of test images that ask for them.
Spanish adjectives have a masculine and a feminine form.
"""

from __future__ import annotations

ENGLISH = {
    "circle": "circle disc | roundel",
    "square": "square box | tile",
    "triangle": "triangle wedge | pyramid",
    "star": "star | asterisk",
    "cross": "cross | plus",
    "diamond": "diamond lozenge | rhombus",
    "heart": "heart | valentine",
    "crescent": "crescent moon | sickle",
    "red": "red scarlet | crimson",
    "green": "green emerald | jade",
    "blue": "blue azure | cobalt",
    "yellow": "yellow golden | lemon",
    "purple": "purple violet | mauve",
    "orange": "orange tangerine | apricot",
    "pink": "pink rose | magenta",
    "white": "white ivory | pearl",
    "large": "large big | huge",
    "small": "small little | tiny",
    "solid": "solid filled | massive",
    "hollow": "hollow outlined | empty",
    "striped": "striped lined | banded",
    "black": "black | ebony",
    "grey": "grey gray | ashen",
    "brown": "brown | umber",
    "teal": "teal | petrol",
    "plain": "plain smooth | bare",
    "dotted": "dotted spotted | speckled",
    "checked": "checked | latticed",
}
SPANISH = {
    "circle": "círculo",
    "square": "cuadrado",
    "triangle": "triángulo",
    "star": "estrella",
    "cross": "cruz",
    "diamond": "rombo",
    "heart": "corazón",
    "crescent": "medialuna",
    "red": "rojo roja",
    "green": "verde verde",
    "blue": "azul azul",
    "yellow": "amarillo amarilla",
    "purple": "morado morada",
    "orange": "naranja naranja",
    "pink": "rosado rosada",
    "white": "blanco blanca",
    "large": "grande grande",
    "small": "pequeño pequeña",
    "solid": "relleno rellena",
    "hollow": "hueco hueca",
    "striped": "rayado rayada",
    "black": "negro negra",
    "grey": "gris gris",
    "brown": "marrón marrón",
    "teal": "turquesa turquesa",
    "plain": "liso lisa",
    "dotted": "punteado punteada",
    "checked": "cuadriculado cuadriculada",
}
FEMININE = ("star", "cross", "crescent")
CHINESE = {
    "circle": "圆形",
    "square": "方形",
    "triangle": "三角形",
    "star": "星形",
    "cross": "十字形",
    "diamond": "菱形",
    "heart": "心形",
    "crescent": "月牙形",
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "pink": "粉色",
    "white": "白色",
    "large": "大",
    "small": "小",
    "solid": "填满",
    "hollow": "镂空",
    "striped": "条纹",
    "black": "黑色",
    "grey": "灰色",
    "brown": "棕色",
    "teal": "青色",
    "plain": "纯净",
    "dotted": "斑点",
    "checked": "格子",
}
RELATIONS = {
    "left": "left of ; to the left of | on the left hand of",
    "right": "right of ; to the right of | on the right hand of",
    "above": "above ; higher than | over",
    "below": "below ; lower than | beneath",
}
RELATIONS_ES = {"left": "a la izquierda de", "right": "a la derecha de", "above": "encima de", "below": "debajo de"}
RELATIONS_ZH = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}
PLACES = ("top left", "top right", "bottom left", "bottom right")
PLACES_EN = {place: f"{place} | {place.replace('top', 'upper').replace('bottom', 'lower')}" for place in PLACES}
PLACES_ES = {
    "top left": "arriba a la izquierda",
    "top right": "arriba a la derecha",
    "bottom left": "abajo a la izquierda",
    "bottom right": "abajo a la derecha",
}
PLACES_ZH = {"top left": "左上", "top right": "右上", "bottom left": "左下", "bottom right": "右下"}

FACTS = {
    "red": "tomato tomate 番茄, blood sangre 血, cherry cereza 樱桃, ruby rubí 宝石",
    "green": "grass hierba 草, leaf hoja 叶, frog rana 蛙, forest bosque 森林",
    "blue": "sky cielo 天, sea mar 海, whale ballena 鲸, lake lago 湖",
    "yellow": "sun sol 太阳, banana plátano 香蕉, corn maíz 玉米, chick pollito 鸡",
    "purple": "grape uva 葡萄, eggplant berenjena 茄, lavender lavanda 薰衣草, amethyst amatista 水晶",
    "orange": "carrot zanahoria 胡萝卜, pumpkin calabaza 南瓜, fox zorro 狐狸, tiger tigre 虎",
    "pink": "pig cerdo 猪, flamingo flamenco 火烈鸟, peach durazno 桃, shrimp gamba 虾",
    "white": "snow nieve 雪, milk leche 奶, salt sal 盐, swan cisne 鹅",
    "black": "night noche 夜, coal carbón 煤, crow cuervo 乌鸦, ink tinta 墨",
    "grey": "elephant elefante 象, mouse ratón 鼠, ash ceniza 烟, stone piedra 石",
    "brown": "bear oso 熊, bread pan 面包, wood madera 木, coffee café 咖啡",
    "teal": "duck pato 鸭, lagoon laguna 泻, peacock pavo 孔雀, copper cobre 铜",
    "circle": "wheel rueda 轮, coin moneda 币, plate plato 盘, clock reloj 钟",
    "square": "window ventana 窗, stamp sello 邮, dice dado 骰, napkin servilleta 巾",
    "triangle": "sail vela 帆, tent carpa 帐, roof techo 屋, slice trozo 片",
    "star": "sheriff alguacil 警, flag bandera 旗, starfish estrellamar 海星, firework cohete 烟花",
    "cross": "hospital hospital 医院, church iglesia 教堂, sum suma 加, grave tumba 墓",
    "diamond": "kite cometa 风筝, jewel joya 珠, baseball béisbol 棒球, cards naipes 牌",
    "heart": "love amor 爱, lover amante 恋, wedding boda 婚, chest pecho 胸",
    "crescent": "croissant cruasán 羊角, horn cuerno 牛, nightsky nocturno 晚, boomerang bumerán 镖",
    "large": "mountain montaña 山, ship barco 船, castle castillo 城",
    "small": "ant hormiga 蚂蚁, seed semilla 籽, crumb miga 屑",
    "solid": "brick ladrillo 砖, rock roca 岩, cheese queso 酪",
    "hollow": "pipe tubo 管, drum tambor 鼓, cave cueva 洞",
    "striped": "zebra cebra 斑马, bee abeja 蜂, pyjamas pijama 睡",
    "plain": "wall pared 墙, sheet sábana 单, plaster yeso 膏",
    "dotted": "ladybird mariquita 瓢虫, leopard leopardo 豹, domino dominó 多米",
    "checked": "chessboard ajedrez 棋, tablecloth mantel 桌, grid rejilla 网",
}
"""Things of the world that have a colour, shape, size or pattern, each in English, Spanish, Chinese."""


def english(concept: str) -> tuple[list[str], list[str]]:
    """The words of a concept: those that come with training images, and those that come in text only."""
    seen, _, unseen = ENGLISH[concept].partition("|")
    return seen.split(), unseen.split()


def phrases(entry: str) -> tuple[list[str], list[str]]:
    """The same for entries whose phrases hold spaces, split by semicolons."""
    seen, _, unseen = entry.partition("|")
    return [p.strip() for p in seen.split(";")], [p.strip() for p in unseen.split(";") if p.strip()]


def facts(concept: str) -> list[tuple[str, str, str]]:
    """Things that are so, each as its English, Spanish and Chinese name."""
    return [tuple(group.split()) for group in FACTS[concept].split(",")]  # type: ignore[misc]
